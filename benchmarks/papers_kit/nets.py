"""Networks for the emulated device, importable by name; and one with a weight that no pass uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ROWS = 192


class Chain(nn.Module):
    """Linear layers of one width."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class HalfUsed(nn.Module):
    """Two large layers, of which a pass uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(1024, 1024), nn.Linear(1024, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.used(x)
        return found


def _factory(width: int, depth: int) -> Any:
    def make() -> nn.Module:
        return Chain(width, depth)

    make.example_inputs = lambda: (torch.ones(_ROWS, width),)  # type: ignore[attr-defined]
    return make


first = _factory(512, 8)
second = _factory(640, 6)
third = _factory(448, 10)
fourth = _factory(768, 4)
NAMES = ("first", "second", "third", "fourth")
