"""Holes in glibc's heap, kept from being used again.

A threshold for ``mmap`` binds only a request for which the heap has no free chunk: one that fits a hole is served
from it, and its pages stay resident when it is freed. A process that has run under another allocator policy has many
(ResNet-101 took 25 to 32 MiB beside its weights instead of 16). So each hole is taken by an allocation that nobody
ever writes to: it holds addresses and next to no memory, and larger requests go to ``mmap`` and back to the system.

Sources: malloc/malloc.c of glibc (``_int_malloc`` asks the bins and the top chunk before ``sysmalloc`` looks at
``mmap_threshold``); "MallocInternals" in glibc's wiki, for the flags before a chunk.
"""

from __future__ import annotations

import ctypes
import threading

from narrowboat.machine.libc import libc

_LARGEST = 256 << 20  # bytes of the first attempt; larger holes are taken in several pieces
_MOST = 4096  # a heap with more holes than this is left as it is
_IS_MMAPPED = 2


def _from_heap(address: int) -> bool:
    """Whether ``malloc`` found ``address`` in a heap: the word before it has the chunk's size and flags."""
    return not ctypes.c_size_t.from_address(address - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED


class HeapHoles:
    """The holes that are taken, of the calling thread's heap. Only where ``malloc`` is glibc's.

    Attributes:
        taken: addresses of the allocations that fill them.
    """

    def __init__(self) -> None:
        self.taken: list[int] = []
        self._lock = threading.Lock()

    def fill(self, least: int) -> int:
        """Take every hole of ``least`` bytes or more; the mmap threshold has to be no larger.

        Returns:
            Bytes of addresses that were taken now. Pages of them that are resident stay so: trim first.
        """
        calls = libc()
        filled, size = 0, _LARGEST
        with self._lock:
            while len(self.taken) < _MOST:
                address = calls.malloc(size)
                if address and _from_heap(address):
                    self.taken.append(address)
                    filled += size
                    continue
                if address:
                    calls.free(address)
                if size == least:
                    break
                size = max(size * 3 // 4, least)
        return filled

    def open(self) -> None:
        """Let the heap use its holes again."""
        with self._lock:
            while self.taken:
                libc().free(self.taken.pop())
