"""Weights, inputs and right answers of the networks, in a folder.

    python benchmarks/serving_kit/materials.py FOLDER

A process of its own: with ``benchmarks`` on its path, ``import torch`` would take ``cuda.py`` there for NVIDIA's
package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import serve_nets
import torch

import narrowboat as nb

INPUTS = 64  # different ones of each network


def main() -> None:
    """Write ``NAME.safetensors`` and ``NAME.npz`` of each."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    for number, name in enumerate(("tiny", "radar", "lidar", "extra")):
        torch.manual_seed(number)
        module = getattr(serve_nets, name)().eval()
        nb.pack(module.state_dict(), folder / f"{name}.safetensors")
        width = serve_nets.TINY if name == "tiny" else serve_nets.WIDTH
        rows = np.random.default_rng(number).standard_normal((INPUTS, 1, width), dtype=np.float32)
        with torch.inference_mode():
            answers = np.stack([module(torch.from_numpy(row)).numpy() for row in rows])
        np.savez(folder / f"{name}.npz", inputs=rows, answers=answers)


if __name__ == "__main__":
    main()
