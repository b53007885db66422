"""Raw pointers into the arena: NumPy arrays and DLPack capsules made of a weight that is in.

A tensor that shares a weight's bytes can be given a new place when the arena's is reused; an array holds a bare pointer
and cannot. So while an arena is open, ``Tensor.numpy()`` and ``Tensor.__dlpack__()`` of a tensor that lies in it work
on a copy. Other tensors are not affected.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

_lock = threading.Lock()
_ranges: dict[int, int] = {}  # start -> end of every open arena
_numpy = torch.Tensor.numpy
_dlpack = torch.Tensor.__dlpack__


def watch(address: int, nbytes: int) -> None:
    """Arrays of tensors in ``[address, address + nbytes)`` are copies from now on."""
    with _lock:
        _ranges[address] = address + nbytes
        torch.Tensor.numpy = _safe_numpy  # type: ignore[method-assign, assignment]
        torch.Tensor.__dlpack__ = _safe_dlpack  # type: ignore[method-assign, assignment]


def forget(address: int) -> None:
    """The arena at ``address`` is closed."""
    with _lock:
        _ranges.pop(address, None)
        if not _ranges:
            torch.Tensor.numpy = _numpy  # type: ignore[method-assign]
            torch.Tensor.__dlpack__ = _dlpack  # type: ignore[method-assign]


def _in_arena(tensor: torch.Tensor) -> bool:
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        return False
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return False
    return any(start <= address < end for start, end in list(_ranges.items()))


def _safe_numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _numpy(self.clone() if _in_arena(self) and not self.requires_grad else self, *args, **kwargs)


def _safe_dlpack(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _dlpack(self.clone() if _in_arena(self) and not self.requires_grad else self, *args, **kwargs)
