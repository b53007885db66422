"""Networks to serve, by ``serve_nets:NAME``: importable where ``PYTHONPATH`` has this folder."""

from __future__ import annotations

import torch
from torch import nn

TINY = 16  # numbers that the tiny network takes and gives
WIDTH, DEPTH = 1024, 8  # of the ones that have to be swapped: 32 MiB each


class Chain(nn.Module):
    """Linear layers one after another."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of one row."""
        for layer in self.layers:
            x = layer(x)
        return x


def tiny() -> Chain:
    """Two layers of 16: what it costs is all around it."""
    return Chain(TINY, 2)


def radar() -> Chain:
    """32 MiB of weights."""
    return Chain(WIDTH, DEPTH)


def lidar() -> Chain:
    """The same, with other weights."""
    return Chain(WIDTH, DEPTH)


def extra() -> Chain:
    """The same again."""
    return Chain(WIDTH, DEPTH)


tiny.example_inputs = lambda: (torch.zeros(1, TINY),)  # type: ignore[attr-defined]
for _factory in (radar, lidar, extra):
    _factory.example_inputs = lambda: (torch.zeros(1, WIDTH),)  # type: ignore[attr-defined]
