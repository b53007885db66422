"""Models that take memory, and a count of what tensors take of it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrowboat.train.tape.leaves import tensors_in
from train_kit import GPT, ResNet


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that are made inside, moment by moment: a count to hold predictions against."""

    def __init__(self, *outside: Any) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata: -1 for tensor in tensors_in(outside)}
        self._changes: list[tuple[int, int]] = []
        self._watch: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, number, nbytes = storage._cdata, len(self._watch), storage.nbytes()
        self._known[key] = number
        self._changes.append((number, nbytes))

        def gone(_: Any) -> None:
            self._changes.append((number, -nbytes))
            del self._known[key]

        self._watch.append(weakref.ref(storage, gone))

    def peak(self, *without: Tensor) -> int:
        """The worst moment, some tensors that are still there not counted."""
        left_out = {self._known.get(tensor.untyped_storage()._cdata) for tensor in without}
        live = most = 0
        for number, change in self._changes:
            if number not in left_out:
                live += change
                most = max(most, live)
        return most


def sizeable(kind: str, *, small: bool = False) -> tuple[nn.Module, Tensor, Tensor]:
    """A "cnn" or "gpt" of some hundred megabytes of activations, and a batch; ``small``: of hardly any."""
    torch.manual_seed(0)
    if kind == "cnn":
        model: nn.Module = ResNet(depth=2 if small else 8, width=8 if small else 64)
        for block in model.blocks:
            block[-1].momentum = 0.1  # a cumulative average reads numbers, which fake tensors do not have
        x = torch.randn(2, 3, 8, 8) if small else torch.randn(8, 3, 64, 64)
        return model.train(), x, torch.randint(0, 10, (len(x),))
    model = GPT(depth=1 if small else 6, width=32 if small else 128)
    text = torch.randint(0, 50, (2, 9) if small else (16, 129))
    return model.train(), text[:, :-1].clone(), text[:, 1:].clone()
