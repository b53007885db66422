"""The program :mod:`narrowboat.machine.openmp_measure` runs: a small network, timed on request.

It is run as a file, so that nothing of narrowboat is imported before torch. Standard input carries one line
``SECONDS`` per request, standard output one line of JSON per answer: the seconds of each pass.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Answer timing requests until standard input ends. The first argument is the number of threads."""
    import torch
    from torch import nn

    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    # Many short parallel regions and a few long ones, as in a real network: the barriers between them are measured.
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(8), nn.Flatten()]
    layers += [nn.Linear(4096, 512), nn.GELU(), nn.Linear(512, 512), nn.LayerNorm(512), nn.Linear(512, 10)]
    model = nn.Sequential(*layers).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for _ in range(3):
            model(image)
        print(json.dumps([]), flush=True)
        for line in sys.stdin:
            end = time.perf_counter() + float(line)
            passes: list[float] = []
            while len(passes) < 3 or time.perf_counter() < end:
                begin = time.perf_counter()
                model(image)
                passes.append(time.perf_counter() - begin)
            print(json.dumps(passes), flush=True)


if __name__ == "__main__":
    main()
