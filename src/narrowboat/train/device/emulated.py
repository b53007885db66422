"""An allocator for a device that is emulated: it counts tensors, and refuses as torch's does on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from narrowboat.quantities import format_bytes
from narrowboat.train.tape.leaves import plain, tensors_in


class CountingAllocator(TorchDispatchMode):
    """See ``allocator.Allocator``: nothing is kept of freed tensors, and what kernels take inside does not count.

    What counts is what the model and the optimizer have, the step's batch, and what operators make inside ``limited``.

    Args:
        model, optimizer: whose tensors are on the device from the beginning.
    """

    slack = 0

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._bytes = self._peak = self._batch_bytes = 0
        self._limit: int | None = None

    def allocated(self) -> int:
        """See ``Allocator``."""
        self._note([*self._model.parameters(), *self._model.buffers(), *_state_of(self._optimizer)])
        return self._bytes + self._batch_bytes

    def reserved(self) -> int:
        """See ``Allocator``."""
        return self.allocated()

    def peaks(self) -> tuple[int, int]:
        """See ``Allocator``."""
        return self._peak, self._peak

    def reset_peaks(self) -> None:
        """See ``Allocator``."""
        self._peak = self.allocated()

    def give_back(self) -> None:
        """See ``Allocator``."""

    def begin(self, batch: Iterable[torch.Tensor]) -> None:
        """See ``Allocator``."""
        self._batch_bytes = sum(
            {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in batch}.values()
        )

    @contextmanager
    def limited(self, nbytes: int | None) -> Iterator[None]:
        """See ``Allocator``."""
        self.allocated()
        before = self._limit
        self._limit = nbytes if before is None or nbytes is None else min(before, nbytes)
        try:
            with self:
                yield
        finally:
            self._limit = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs or {})) if plain(tensor)}
        self._note(tensors_in(out), given)
        held = self._bytes + self._batch_bytes
        self._peak = max(self._peak, held)
        if self._limit is not None and held > self._limit:
            raise torch.OutOfMemoryError(
                f"the emulated device is out of memory: {format_bytes(held)} are allocated and "
                f"{format_bytes(self._limit)} allowed"
            )
        return out

    def _note(self, tensors: Iterable[torch.Tensor], known: Container[int] = ()) -> None:
        for tensor in tensors:
            if not plain(tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._alive or key in known:
                continue
            nbytes = storage.nbytes()

            def gone(reference: object, key: int = key, nbytes: int = nbytes) -> None:
                if key in self._alive and self._alive[key][0] is reference:
                    del self._alive[key]
                    self._bytes -= nbytes

            self._alive[key] = weakref.ref(storage, gone), nbytes
            self._bytes += nbytes


def _state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, torch.Tensor)]
