"""Holes in glibc's heap, kept from being used again.

A threshold for ``mmap`` binds only a request for which the heap has no free chunk: one that fits a hole is served
from it, and its pages stay resident when it is freed. A process that has run under another allocator policy has many
(ResNet-101 took 25 to 32 MiB beside its weights instead of 16). So each hole is taken by an allocation that nobody
ever writes to: it holds addresses and next to no memory, and larger requests go to ``mmap`` and back to the system.

Sources: malloc/malloc.c of glibc (``_int_malloc`` asks the bins and the top chunk before ``sysmalloc`` looks at
``mmap_threshold``); mallinfo(3).
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from typing import Any

_LARGEST = 256 << 20  # bytes of the first attempt; larger holes are taken in several pieces
_MOST = 4096  # a heap with more holes than this is left as it is


class _MallInfo2(ctypes.Structure):
    # fmt: off
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]
    # fmt: on


@lru_cache(maxsize=1)
def _libc() -> Any:
    """glibc, or None where it is too old to be asked (before 2.33)."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _MallInfo2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    return libc


class HeapHoles:
    """The holes that are taken; of the calling thread's heap, which is the main one's unless it has its own.

    Attributes:
        taken: addresses of the allocations that fill them.
    """

    def __init__(self) -> None:
        self.taken: list[int] = []
        self._lock = threading.Lock()

    def fill(self, least: int) -> int:
        """Take every hole of ``least`` bytes or more; the mmap threshold has to be no larger.

        Returns:
            Bytes of addresses that were taken now; they were given back to the system before, or stay what they are.
        """
        libc = _libc()
        if libc is None:
            return 0
        filled, size = 0, _LARGEST
        with self._lock:
            while len(self.taken) < _MOST:
                mapped = libc.mallinfo2().hblks
                address = libc.malloc(size)
                if address and libc.mallinfo2().hblks <= mapped:
                    self.taken.append(address)
                    filled += size
                    continue
                if address:
                    libc.free(address)
                if size == least:
                    break
                size = max(size * 3 // 4, least)
        return filled

    def open(self) -> None:
        """Let the heap use its holes again."""
        libc = _libc()
        with self._lock:
            while self.taken:
                libc.free(self.taken.pop())
