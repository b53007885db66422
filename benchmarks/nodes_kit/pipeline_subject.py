"""What is split: a ViT whose weights three nodes can hold together, and none alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from narrowboat import zoo
from narrowboat.checkpoint import open_index, pack
from narrowboat.report.plain import load_weights
from narrowboat.zoo.save import save_random_weights
from nodes_kit.pipeline import measure_pipeline

_MODEL = "vit_large"
BUDGET = 480 << 20  # of each node; the weights are some 1.13 GiB


def subject(folder: Path, nodes: list[str], quick: bool) -> dict[str, Any]:
    """Measured on these nodes.

    Args:
        folder: for the weights.
        nodes: names.
        quick: fewer calls.
    """
    entry = zoo.get(_MODEL)
    weights = folder / f"{_MODEL}.safetensors"
    if not weights.exists():
        save_random_weights(_MODEL, folder / "plain.safetensors", overwrite=True)
        pack(folder / "plain.safetensors", weights)
        (folder / "plain.safetensors").unlink()
    torch.set_num_threads(1)
    example = entry.example_inputs()
    with torch.inference_mode():
        plain = entry().eval()
        load_weights(plain, open_index(weights))
        want = plain(*example)
        del plain
    return measure_pipeline(
        entry, weights, example, nodes, BUDGET, calls=4 if quick else 10, inputs=6 if quick else 24, want=want
    )
