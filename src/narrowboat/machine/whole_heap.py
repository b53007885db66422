"""One heap for everything, in huge pages, that keeps what is freed until it is asked to give it back.

A training step under a plan makes and frees its activations again and again. Where each one is mapped and unmapped,
the kernel clears the same pages over and over: MobileNet-v2 spent twice as long on that as on its convolutions.
glibc's heap serves them from its holes instead; nothing is mapped apart, the heap's end stays, and pages are of 2 MiB
where the machine allows programs to ask for them (``madvise`` in transparent_hugepage/enabled). What the holes hold
is resident: whoever opens this gives it back in time (``train.heap_guard``).

Sources: mallopt(3), M_MMAP_MAX and M_TRIM_THRESHOLD; madvise(2), MADV_HUGEPAGE; malloc/malloc.c of glibc.
"""

from __future__ import annotations

from functools import lru_cache

from narrowboat.machine.libc import libc
from narrowboat.machine.malloc import MallocPolicy, allocator_name, never_map, set_malloc_policy, trim

STRETCH = 128 << 20  # bytes of addresses at the heap's end that are advised at once
_HUGE = 2 << 20
_MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 14, 15


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
