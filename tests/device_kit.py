"""A small network on an emulated device: what the tests of streaming to devices share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import narrowboat as nb
from narrowboat.arena.device.access import AccessWatch
from narrowboat.arena.device.emulated import EmulatedDevice

GRAIN = 4096


class Tower(nn.Module):
    """Layers of given widths, one after the other; one of them twice."""

    def __init__(self, widths: tuple[int, ...] = (96, 128, 64, 160, 96, 128, 64, 96), again: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norm = nn.BatchNorm1d(widths[-1])
        self.turn = nn.Linear(widths[-1], widths[-1])
        self.register_buffer("shift", torch.full((widths[-1],), 0.25), persistent=False)
        self.again = again

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        x = self.turn(self.norm(x)) + self.shift
        return self.turn(x) if self.again else x


class DeviceKit:
    """One model, its file, and what plain PyTorch gives.

    Args:
        folder: for the file.
        packed: the file's tensors begin at page boundaries.
        widths: of the layers.
        kind: ``"emulated"`` or ``"cuda"``.
    """

    def __init__(
        self, folder: Path, *, packed: bool = True, widths: tuple[int, ...] | None = None, kind: str = "emulated"
    ) -> None:
        if kind == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        self.kind = kind
        torch.manual_seed(7)
        self.make = (lambda: Tower(widths)) if widths else Tower
        self.plain = self.make().eval()
        self.path = folder / f"tower-{'packed' if packed else 'loose'}.safetensors"
        state = {name: tensor.detach().clone() for name, tensor in self.plain.state_dict().items()}
        if packed:
            nb.pack(state, self.path, overwrite=True)
        else:
            save_file(state, self.path)
        self.place = torch.device("cuda" if kind == "cuda" else "cpu")
        self.plain.to(self.place)
        self.x = torch.randn(3, self.plain.layers[0].in_features).to(self.place)
        with torch.inference_mode():
            self.want = self.plain(self.x)

    def device(self, **options: Any) -> Any:
        """An emulated device with small chunks; or the GPU, for which only ``unified`` can be chosen."""
        if self.kind == "cuda":
            from narrowboat.arena.device.cuda import CudaDevice

            return CudaDevice(torch.cuda.current_device(), unified=options.get("unified", False))
        options.setdefault("granularity", GRAIN)
        return EmulatedDevice(options.pop("capacity", 64 << 20), **options)

    def randn(self, *shape: int) -> torch.Tensor:
        """Random numbers where the model is."""
        return torch.randn(*shape).to(self.place)

    def stream(self, device: Any, budget: Any = None, host: Any = None, **options: Any) -> nn.Module:
        """The model on ``device``; by default in the smallest budget there is."""
        if budget is None:
            budget = self.least(device)
        if host is not None:
            budget = {self.kind: budget, "cpu": host}
        options.setdefault("example", (self.x,))
        return nb.stream(self.make, self.path, budget=budget, device=device, **options).eval()

    def least(self, device: Any) -> int:
        """The smallest budget of the device's memory."""
        try:
            nb.stream(self.make, self.path, budget=1, device=device, example=(self.x,))
        except nb.errors.BudgetError as error:
            return error.minimum
        raise AssertionError("one byte was enough")

    def right(self, model: nn.Module, passes: int = 3) -> bool:
        """Whether so many passes give plain PyTorch's bits."""
        with torch.inference_mode():
            return all(torch.equal(model(self.x), self.want) for _ in range(passes))


def held(model: Any) -> int:
    """Bytes of the device's memory behind a streamed model's arena."""
    return int(nb.session(model).slab.mapped_bytes)


@contextmanager
def watched(device: Any) -> Iterator[AccessWatch | None]:
    """Every operator's use of an emulated device's bytes is proved to be ordered; some use there must be."""
    if not isinstance(device, EmulatedDevice):
        yield None
        return
    with AccessWatch(device) as watch:
        yield watch
    assert watch.reads
