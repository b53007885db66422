"""Small networks and rows for data sets over a cluster; imported by the workers too."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import narrowboat as nb

# Before Ray is imported, by whichever test is first: see ``cluster_kit``.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
WIDTH = 768


class Deep(nn.Module):
    """Wide layers with little computing: several inputs per sweep are worth it."""

    def __init__(self, width: int = WIDTH, depth: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Tally(nn.Module):
    """Two inputs by name, a dict of outputs, some of them no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor, shift: float = 0.0) -> dict[str, Any]:
        hidden = self.words(ids).mean(dim=1)
        return {"logits": self.out(hidden) * scale[:, None] + shift, "hidden": hidden, "cache": None}


class Pixels(nn.Module):
    """An image of any size to four numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)).mean(dim=(2, 3)))


def deep() -> nn.Module:
    return Deep()


def tally() -> nn.Module:
    return Tally()


def pixels() -> nn.Module:
    return Pixels()


def write(factory: Any, path: Path, seed: int = 0) -> nn.Module:
    """A model with weights of its own, packed; returned in one piece, for comparison."""
    torch.manual_seed(seed)
    model = factory().eval()
    nb.pack(model.state_dict(), path)
    return model  # type: ignore[no-any-return]


def as_image(row: dict[str, Any]) -> torch.Tensor:
    """From bytes of pixels to what the network takes."""
    return torch.from_numpy(row["image"].copy()).permute(2, 0, 1).unsqueeze(0).float() / 255


class Slow(Deep):
    """Takes its time, so that something can happen in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return super().forward(x)


def slow() -> nn.Module:
    return Slow(64, 2)


class Mean(nn.Module):
    """Large rows to small outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x.mean(dim=1))


def mean() -> nn.Module:
    return Mean()


def large_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """256 KiB of floats for each id."""
    ids = batch["id"]
    return {"id": ids, "x": np.stack([np.full((1024, 64), float(i % 97), dtype=np.float32) for i in ids])}


def label(output: torch.Tensor) -> dict[str, Any]:
    """The best of the scores, and all of them."""
    return {"label": int(output.argmax()), "scores": output}
