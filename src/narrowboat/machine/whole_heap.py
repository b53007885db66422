"""One heap for everything, in huge pages, that keeps what is freed until it is asked to give it back.

A training step under a plan makes and frees its activations again and again. Where each one is mapped and unmapped,
the kernel clears the same pages over and over: MobileNet-v2 spent twice as long on that as on its convolutions.
glibc's heap serves them from its holes instead; nothing is mapped apart, the heap's end stays, and pages are of 2 MiB
where the machine allows programs to ask for them (``madvise`` in transparent_hugepage/enabled). What the holes hold
is resident: whoever opens this gives it back in time (``train.heap_guard``).

Sources: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD; madvise(2), MADV_HUGEPAGE; mincore(2); malloc/malloc.c of glibc.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from functools import lru_cache

from narrowboat.machine.libc import libc
from narrowboat.machine.malloc import MallocPolicy, allocator_name, never_map, set_malloc_policy, trim

STRETCH = 128 << 20  # bytes of addresses at the heap's end that are advised at once
_HUGE = 2 << 20
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 4, 14, 15
_PAGE = mmap.PAGESIZE
_ALIGNED = 64  # bytes, as torch asks for its tensors
_SMALLEST_HOLE = 256 << 10  # bytes; what is smaller is left to ``give_back``
_MOST_HOLES = 48  # that are looked at


@lru_cache(maxsize=1)
def _start() -> int:
    """Where the heap begins, at a huge page; 0 where there is none."""
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            for line in maps:
                if line.rstrip().endswith("[heap]"):
                    return -(-int(line.split("-")[0], 16) // _HUGE) * _HUGE
    except OSError:
        pass
    return 0


def open_whole_heap() -> bool:
    """From now on, and until the next ``set_malloc_policy``, everything comes from the heap, which keeps it.

    Returns:
        False where the allocator is not glibc's.
    """
    if not set_malloc_policy(MallocPolicy.GUARDED):
        return False
    _stretch()
    return True


def give_back() -> None:
    """Give what is free in the heap back to the system."""
    trim(refill=False)
    if allocator_name() == "glibc":
        _stretch()  # the end of the heap went back with its advice


def map_apart() -> None:
    """Until ``open_whole_heap``: map each block of a MiB or more by itself, and unmap it when it is freed."""
    _advise(_MADV_NOHUGEPAGE)  # or each hole that is closed to other requests would take a huge page for its header
    set_malloc_policy(MallocPolicy.BALANCED)


class Reserved:
    """Blocks that were taken from the heap and not touched: whoever asks for such sizes once they are freed gets them.

    Attributes:
        fresh: bytes of them that are not resident.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._blocks: list[int] = []
        self.fresh = 0
        for size in sizes:
            block = ctypes.c_void_p()
            if libc().posix_memalign(ctypes.byref(block), _ALIGNED, size) == 0 and block.value:
                self._blocks.append(block.value)
                self.fresh += size - _resident(block.value, size)

    def free(self) -> None:
        """Back to the heap, as they were."""
        while self._blocks:
            libc().free(self._blocks.pop())


def reserve(sizes: Iterable[int]) -> Reserved:
    """Take blocks of these sizes, in this order, and do not touch them."""
    return Reserved(sizes)


def give_back_some(nbytes: int) -> int:
    """Give so many bytes of large holes back to the system, the largest first, and leave the others as they are.

    Returns:
        Bytes that went back; less than asked for where the holes hold no more, or are many and small.
    """
    calls, taken, given, size = libc(), [], 0, max(nbytes, _SMALLEST_HOLE)
    for _ in range(_MOST_HOLES):
        block = calls.malloc(size)
        if not block:
            break
        taken.append(block)
        held = _resident(block, size)
        if held:
            first, last = -(-block // _PAGE) * _PAGE, (block + size) // _PAGE * _PAGE
            if first < last:
                calls.madvise(first, last - first, _MADV_DONTNEED)
            given += held
        elif size > _SMALLEST_HOLE:
            size = max(size // 2, _SMALLEST_HOLE)
        else:
            break
        if given >= nbytes:
            break
    for block in reversed(taken):
        calls.free(block)
    return given


def _resident(address: int, size: int) -> int:
    """Bytes of whole pages within a block that are resident."""
    first, last = -(-address // _PAGE), (address + size) // _PAGE
    if first >= last:
        return size  # shares its pages with others
    pages = ctypes.create_string_buffer(last - first)
    if libc().mincore(first * _PAGE, (last - first) * _PAGE, pages) != 0:
        return 0
    return (last - first - pages.raw.count(0, 0, last - first)) * _PAGE


def _stretch() -> None:
    """Take addresses at the heap's end, untouched, and ask for huge pages in all of it."""
    if not never_map():
        return
    libc().free(libc().malloc(STRETCH))  # freed, they stay: the trim threshold is the largest there is
    _advise(_MADV_HUGEPAGE)


def _advise(advice: int) -> None:
    """Of the whole heap. On a machine without huge pages it is refused, and all works as before."""
    start, end = _start(), libc().sbrk(0)
    if start and end > start:
        libc().madvise(start, end - start, advice)
