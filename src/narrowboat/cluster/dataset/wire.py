"""Tensors between a sender and a worker: bytes that Ray's object store carries without pickling them."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from narrowboat.machine.libc import libc

_DONTNEED = 4  # MADV_DONTNEED, madvise(2)
_STORE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) .*plasma")


@dataclass(frozen=True)
class Packed:
    """A tensor.

    Attributes:
        dtype: of PyTorch, so that there is one for those that NumPy has not.
        shape: of it.
        data: its bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]


def pack(value: Any) -> Any:
    """Tensors in ``value``, however nested, as bytes."""
    return tree_map(_pack, value)


def unpack(value: Any) -> Any:
    """Tensors again, in memory of their own: what the store gives may be read by all and written by nobody."""
    return tree_map(_unpack, value)


def nbytes(value: Any) -> int:
    """Bytes of the tensors in ``value``, however nested."""
    total = 0

    def count(leaf: Any) -> Any:
        nonlocal total
        total += leaf.numel() * leaf.element_size() if isinstance(leaf, torch.Tensor) else 0
        return leaf

    tree_map(count, value)
    return total


def let_store_go() -> None:
    """Take the pages of Ray's object store that were looked at out of this process's resident memory.

    They stay in the store. A session counts what its process holds, and would take them for its own.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace")
    except OSError:
        return
    for line in maps.splitlines():
        found = _STORE.match(line)
        if found and line.split()[1].endswith("s"):  # shared: what is let go is read again from the store
            start, end = int(found[1], 16), int(found[2], 16)
            if start % mmap.PAGESIZE == 0:
                libc().madvise(start, end - start, _DONTNEED)


def _pack(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    flat = leaf.detach().cpu().contiguous().reshape(-1)
    return Packed(leaf.dtype, tuple(leaf.shape), flat.view(torch.uint8).numpy())


def _unpack(leaf: Any) -> Any:
    if not isinstance(leaf, Packed):
        return leaf
    flat = torch.empty(leaf.data.nbytes, dtype=torch.uint8)
    flat.numpy()[:] = leaf.data
    return flat.view(leaf.dtype).reshape(leaf.shape)
