"""Raw pointers into the arena: NumPy arrays and DLPack capsules made of a weight that is in.

A tensor that shares a weight's bytes can be given a new place when the arena's is reused; an array holds a bare
pointer and cannot. So while an arena is open, ``Tensor.numpy()`` and ``Tensor.__dlpack__()`` of a tensor that lies in
it work on a copy. Other tensors are not affected.
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch

_lock = threading.RLock()  # a collection inside may end a slab, which forgets its addresses
_ranges: dict[int, tuple[int, int]] = {}  # ticket -> addresses of every open arena
_tickets = itertools.count(1)
_numpy = torch.Tensor.numpy
_dlpack = torch.Tensor.__dlpack__


def watch(address: int, nbytes: int) -> int:
    """Arrays of tensors in ``[address, address + nbytes)`` are copies from now on; returns a ticket for ``forget``."""
    with _lock:
        ticket = next(_tickets)
        _ranges[ticket] = (address, address + nbytes)
        torch.Tensor.numpy = _safe_numpy  # type: ignore[method-assign, assignment]
        torch.Tensor.__dlpack__ = _safe_dlpack  # type: ignore[method-assign]
    return ticket


def forget(ticket: int) -> None:
    """The arena is closed. Its addresses may be another's by now, which is why they are not the key."""
    with _lock:
        _ranges.pop(ticket, None)
        if not _ranges:
            torch.Tensor.numpy = _numpy  # type: ignore[method-assign]
            torch.Tensor.__dlpack__ = _dlpack  # type: ignore[method-assign]


def _in_arena(tensor: torch.Tensor) -> bool:
    if tensor.device.type not in ("cpu", "cuda") or tensor.layout is not torch.strided:
        return False
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return False
    return any(start <= address < end for start, end in list(_ranges.values()))


def _safe_numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _numpy(self.clone() if _in_arena(self) and not self.requires_grad else self, *args, **kwargs)


def _safe_dlpack(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _dlpack(self.clone() if _in_arena(self) and not self.requires_grad else self, *args, **kwargs)
