"""Small networks with weights, importable by name in a process of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import narrowboat as nb

MODULE = '''
import torch
from torch import nn


class Deep(nn.Module):
    def __init__(self, width=256, depth=6):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


TOLD = {"fail": False}


class Moody(Deep):
    """Fails in its middle, when told to."""

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 3 and TOLD["fail"]:
                raise RuntimeError("failed in the middle")
        return x


def deep():
    return Deep()


def wide():
    return Deep(1024, 2)


wide.example_inputs = lambda: (torch.ones(1, 1024),)


deep.example_inputs = lambda: (torch.ones(1, 256),)


def other():
    return Deep(128, 9)


other.example_inputs = lambda: (torch.ones(1, 128),)


def moody():
    return Moody()


moody.example_inputs = lambda: (torch.ones(1, 256),)


def bad_inputs():
    for number in range(100):
        TOLD["fail"] = bool(number % 2)
        yield torch.ones(1, 256)


def three_inputs():
    for number in range(3):
        yield torch.full((1, 256), float(number))
'''


def write_nets(folder: Path) -> None:
    """The module ``tasks_test_nets``, importable from ``folder``, and the weights deep, other, moody and wide."""
    (folder / "tasks_test_nets.py").write_text(MODULE)
    sys.modules.pop("tasks_test_nets", None)
    import tasks_test_nets  # type: ignore[import-not-found]

    for name in ("deep", "other", "moody", "wide"):
        torch.manual_seed(len(name))
        nb.pack(getattr(tasks_test_nets, name)().state_dict(), folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the networks and their weights; the current one, as for a user."""
    folder = tmp_path_factory.mktemp("nets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setenv("NARROWBOAT_CACHE", str(folder / "cache"))
        write_nets(folder)
        yield folder
    sys.modules.pop("tasks_test_nets", None)
