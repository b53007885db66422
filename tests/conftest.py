"""A network deep enough to have to swap, with its weights at rest, and what plain PyTorch makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from narrowboat.errors import BudgetError, NarrowboatError

MIB = 1 << 20


class Layer(nn.Module):
    """A residual layer of 260 KiB, more than half of what blocks are filled up to: each is a block of its own."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.fc(self.norm(x)))


class DeepNet(nn.Module):
    """Ten layers, one kept buffer and one that is no part of the state dict.

    ``before[i]`` is called before layer ``i`` runs, to make things happen in the middle of a pass.
    """

    def __init__(self, depth: int = 10, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.head = nn.Linear(width, 10)
        self.register_buffer("scale", torch.full((width,), 0.5))
        self.register_buffer("mask", torch.ones(width), persistent=False)
        self.before: dict[int, Callable[[], Any]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale * self.mask
        for i, layer in enumerate(self.layers):
            if i in self.before:
                self.before[i]()
            x = layer(x)
        return self.head(x)


@dataclass
class Deep:
    """The network, its weights file, its answer, and the smallest budget that streams it."""

    plain: DeepNet
    path: Path
    x: torch.Tensor
    want: torch.Tensor
    minimum: int
    net: type[DeepNet] = DeepNet
    opened: list[nn.Module] = field(default_factory=list)

    def stream(self, model: Any = None, path: Any = None, **options: Any) -> Any:
        """``nb.stream`` at the smallest budget unless told otherwise; closed when the test ends."""
        options.setdefault("budget", self.minimum)
        options.setdefault("example", (self.x,))
        made = nb.stream(self.net if model is None else model, self.path if path is None else path, **options)
        self.opened.append(made)
        return made.eval()

    def right(self, model: nn.Module, passes: int = 2) -> bool:
        """Whether that many passes give plain PyTorch's bits."""
        with torch.inference_mode():
            return all(torch.equal(model(self.x), self.want) for _ in range(passes))

    def assert_state(self, state: dict[str, torch.Tensor]) -> None:
        """Every tensor of a state dict is the weights file's."""
        expected = self.plain.state_dict()
        assert list(state) == list(expected)
        assert [k for k, v in expected.items() if not torch.equal(state[k], v)] == []

    def copy(self, path: Path) -> Path:
        """The weights once more, packed, in a file of their own."""
        nb.pack(self.plain.state_dict(), path)
        return path

    @staticmethod
    def least(model: Any, path: Path, *args: Any) -> int:
        """The smallest budget in bytes that streams ``model``."""
        with pytest.raises(BudgetError) as refused:
            nb.stream(model, path, budget=1, example=args)
        return refused.value.minimum


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What this machine's user has measured and kept must not decide what a test sees, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROWBOAT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def deep_at_rest(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    torch.manual_seed(0)
    plain = DeepNet().eval()
    x = torch.randn(2, 256)
    path = tmp_path_factory.mktemp("weights") / "deep.safetensors"
    nb.pack(plain.state_dict(), path)
    with torch.inference_mode():
        want = plain(x)
    return Deep(plain, path, x, want, Deep.least(DeepNet, path, x))


@pytest.fixture
def deep(deep_at_rest: Deep) -> Iterator[Deep]:
    """The network of the session, with a list of its own of models to close."""
    kit = Deep(deep_at_rest.plain, deep_at_rest.path, deep_at_rest.x, deep_at_rest.want, deep_at_rest.minimum)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield kit
    torch.set_num_threads(threads)
    for model in kit.opened:
        with suppress(NarrowboatError):
            nb.session(model).close()
