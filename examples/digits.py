"""Train a small residual network on scikit-learn's handwritten digits, plainly and in a tenth of the activations.

    python examples/digits.py [--epochs 8] [--spill FOLDER]

Both runs start from the same weights and see the same batches in the same order. BatchNorm is in training mode, so
narrowboat does not split a batch: its gradients are those of the plain step, and so is what the network learns.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

# With so few MiB freed tensors go back to the system at once; huge pages make taking them anew cheaper.
# torch reads this at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import narrowboat as nb
from narrowboat.quantities import format_bytes

BATCH = 128
Step = Callable[[torch.Tensor, torch.Tensor], Any]


class Residual(nn.Module):
    """Two convolutions with BatchNorm, added to their input: [batch, width, 8, 8] to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.branch(x))


def network(width: int = 24, blocks: int = 30) -> nn.Module:
    """Images [batch, 1, 8, 8] to logits [batch, 10]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        *(Residual(width) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """1,437 images to learn from and 360 to be tested on, [number, 1, 8, 8] in [0, 1], with their digits."""
    told = load_digits()
    order = torch.randperm(len(told.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(told.images, dtype=torch.float32).unsqueeze(1) / 16)[order]
    targets = torch.tensor(told.target)[order]
    return (images[360:], targets[360:]), (images[:360], targets[:360])


def plain_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """What narrowboat's step stands for."""

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def highest(run: Callable[[], Any]) -> int:
    """Bytes that torch's allocator holds at most while ``run`` runs, above what it holds before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def train(make_step: Callable[[nn.Module, torch.optim.Optimizer], Step], epochs: int) -> tuple[float, int, float]:
    """Train from the start.

    Returns:
        Accuracy on the images that were kept back; the most bytes of a step above what it starts with, measured on
        the last one; seconds of the steps without that one.
    """
    (images, targets), (test_images, test_targets) = digits()
    module = network()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    step = make_step(module, optimizer)
    shuffle = torch.Generator().manual_seed(1)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(images), generator=shuffle).split(BATCH)]
    *batches, last = (rows for rows in batches if len(rows) == BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    start = time.perf_counter()
    for rows in batches:
        step(images[rows], targets[rows])
        schedule.step()
    seconds = time.perf_counter() - start
    optimizer.zero_grad()
    inputs, wanted = images[last], targets[last]
    peak = highest(lambda: step(inputs, wanted))
    module.eval()
    with torch.no_grad():
        accuracy = (module(test_images).argmax(1) == test_targets).float().mean().item()
    return accuracy, peak, seconds


def main() -> None:
    """Train twice and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--spill", help="a folder that activations may be put into")
    arguments = parser.parse_args()
    accuracy, activations, seconds = train(plain_step, arguments.epochs)
    module = network()
    # Weights, gradients and AdamW's two averages are of a size; running statistics there are once.
    static = 4 * sum(p.nbytes for p in module.parameters()) + sum(b.nbytes for b in module.buffers())
    budget = static + activations // 10
    print(f"plain PyTorch   {accuracy:.2%} right, {format_bytes(activations)} of activations, {seconds:.1f} s")

    def in_budget(module: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        return nb.train_step(module, F.cross_entropy, optimizer, budget=budget, spill=arguments.spill)

    accuracy, activations, seconds = train(in_budget, arguments.epochs)
    print(
        f"narrowboat      {accuracy:.2%} right, {format_bytes(activations)} of activations, {seconds:.1f} s, "
        f"budget {format_bytes(budget)} of which {format_bytes(static)} are weights, gradients and optimizer state"
    )


if __name__ == "__main__":
    main()
