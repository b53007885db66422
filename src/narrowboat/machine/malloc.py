"""How glibc's allocator keeps, or gives back, the memory of freed tensors.

torch takes the memory of CPU tensors from malloc. By default glibc learns from the sizes it sees and soon
serves even large tensors from its heap, where holes between live tensors stay resident: a pass can hold several
times the bytes its tensors need. A policy trades that excess against page faults.

Sources: mallopt(3), malloc_trim(3); c10/core/impl/alloc_cpu.cpp for ``THP_MEM_ALLOC_ENABLE``.
"""

from __future__ import annotations

import ctypes
import threading
from enum import Enum
from functools import lru_cache
from pathlib import Path

from narrowboat.machine.cgroup_tree import ROOT, read_text
from narrowboat.machine.heap_holes import HeapHoles
from narrowboat.machine.libc import libc

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_GLIBC_MOST_MAPPED = 65_536
_INT_MAX = (1 << 31) - 1
_KIB, _MIB = 1 << 10, 1 << 20
_REPLACEMENTS = ("jemalloc", "tcmalloc", "mimalloc")

THP_VARIABLE = "THP_MEM_ALLOC_ENABLE"


class MallocPolicy(Enum):
    """How eagerly freed tensor memory goes back to the system.

    Measured with torch 2.13 and glibc 2.36, inference: the high-water mark of resident memory over the peak of live
    tensor bytes, the largest of two runs, and CPU time against ``DEFAULT``, the smallest of two. Three models:
    22 ResNet bottleneck blocks at 224 x 224 (12 MiB of live tensors), six ViT-B layers over 577 tokens (24 MiB), and
    16 bottleneck blocks at 640 x 640 (100 MiB). The two cores were shared: times are good to some 10 %.

    ============  =======  ============================================  =====================================
    policy        over     what it does                                  CPU time
    ============  =======  ============================================  =====================================
    ``DEFAULT``   2.3-3.2  glibc learns the sizes and keeps the holes    1
    ``GUARDED``   1.1-1.5  as ``DEFAULT``, but the holes go back to the  1.03 (FCN) to 1.5 (ResNet); of the
                           system before a step they leave no room for   zoo's models (docs/memory.md)
                           (``stream.heap_guard``)
    ``BALANCED``  1.1-2.2  blocks from 1 MiB go back to the system when  1.04 (ViT) to 1.25 (ResNet)
                           freed; smaller ones come from the heap
    ``LEAN``      1.1-1.6  blocks from 256 KiB, and a heap from 1 MiB    1.6 (ResNet)
    ``STRICT``    1.1-1.4  blocks from 64 KiB go back when freed         1.0-1.2 (ViT) to 3 (ResNet)
    ============  =======  ============================================  =====================================

    On the convolutional networks no policy keeps resident memory near the tensors' bytes for less than 5 % of the
    time: what goes back must be faulted in and zeroed again. Huge pages make that cheaper: with ``BALANCED`` and
    ``STRICT`` set the environment variable ``THP_MEM_ALLOC_ENABLE=1`` (:data:`THP_VARIABLE`) before torch is
    imported, as the times above have it. With ``DEFAULT`` that variable can make resident memory larger: 3.9 times
    the tensors' bytes was seen.
    """

    DEFAULT = "default"
    GUARDED = "guarded"
    BALANCED = "balanced"
    LEAN = "lean"
    STRICT = "strict"


# glibc has no way back to learning; these are the values at which its learning ends.
_GLIBC_LARGEST = ((_M_MMAP_THRESHOLD, 32 * _MIB), (_M_TRIM_THRESHOLD, 64 * _MIB))
_SETTINGS: dict[MallocPolicy, tuple[tuple[int, int], ...]] = {
    MallocPolicy.DEFAULT: _GLIBC_LARGEST,
    MallocPolicy.GUARDED: _GLIBC_LARGEST,
    MallocPolicy.BALANCED: ((_M_MMAP_THRESHOLD, _MIB), (_M_TRIM_THRESHOLD, 64 * _MIB)),
    MallocPolicy.LEAN: ((_M_MMAP_THRESHOLD, 256 * _KIB), (_M_TRIM_THRESHOLD, _MIB)),
    MallocPolicy.STRICT: ((_M_MMAP_THRESHOLD, 64 * _KIB), (_M_TRIM_THRESHOLD, 128 * _KIB)),
}

KEEPING = (MallocPolicy.DEFAULT, MallocPolicy.GUARDED)  # what is freed stays in the heap

_END_BYTES = 4 * _MIB  # more than any hole of a worker's heap, so that it is taken from the heap's end

_in_force: MallocPolicy | None = None  # None: glibc still learns
_setting = threading.Lock()
_holes = HeapHoles()
_fill_from: int | None = None  # bytes; None where the heap may use its holes


@lru_cache(maxsize=8)
def allocator_name(root: Path = ROOT) -> str:
    """``"glibc"``, the name of the library preloaded in its place, or ``"other"`` (musl, macOS)."""
    maps = read_text(root / "proc/self/maps") or ""
    for name in _REPLACEMENTS:
        if f"lib{name}" in maps:
            return name
    try:
        ctypes.CDLL(None).gnu_get_libc_version  # noqa: B018 - asking for the symbol is the question
    except (OSError, AttributeError):
        return "other"
    return "glibc"


def set_malloc_policy(policy: MallocPolicy | str) -> bool:
    """Put ``policy`` in force in this process, for allocations from now on.

    What lies in the heap already stays there until it is freed; the holes of its free blocks are given back, and all
    policies but ``DEFAULT`` keep tensors out of them (``machine.heap_holes``).

    Returns:
        False where the allocator is not glibc's, or refuses.

    Raises:
        ValueError: no such policy.
    """
    global _in_force, _fill_from
    wanted = MallocPolicy(policy)
    if allocator_name() != "glibc":
        return False
    if wanted is MallocPolicy.DEFAULT and _in_force is None:
        trim()
        return True
    _holes.open()
    with _setting:
        _in_force = wanted
        accepted = _apply((*_SETTINGS[wanted], (_M_MMAP_MAX, _GLIBC_MOST_MAPPED)))
    _fill_from = None if wanted in KEEPING else dict(_SETTINGS[wanted])[_M_MMAP_THRESHOLD]
    trim()
    return accepted


def _apply(settings: tuple[tuple[int, int], ...]) -> bool:
    return all(libc().mallopt(option, value) == 1 for option, value in settings)


def never_map() -> bool:
    """Everything comes from the heap, and its end stays, until the next policy is set; False where that is refused."""
    with _setting:
        return _apply(((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _INT_MAX)))


def give_back_own_heap() -> None:
    """Give the free end of the calling thread's heap back to the system; for a thread that is about to end.

    glibc gives each thread a heap, keeps it for the next thread, and shortens it only when a block is freed at its end
    and the trim threshold is passed; ``malloc_trim`` leaves that end alone in every heap but the first. Five threads
    that had computed matrix products kept 19 MiB so.
    """
    global _in_force
    if allocator_name() != "glibc":
        return
    with _setting:
        _in_force = _in_force or MallocPolicy.DEFAULT
        try:
            _apply(((_M_MMAP_THRESHOLD, 32 * _MIB), (_M_TRIM_THRESHOLD, 128 * _KIB)))
            libc().free(libc().malloc(_END_BYTES))  # its pages are not touched
        finally:
            _apply(_SETTINGS[_in_force])


def trim(*, refill: bool = True) -> bool:
    """Give the free pages of the heap back to the system now; True if there were any.

    Args:
        refill: keep tensors out of the holes from now on, if the policy in force does; for between passes.
    """
    if allocator_name() != "glibc":
        return False
    gave = bool(libc().malloc_trim(0))
    if refill and _fill_from is not None:
        _holes.fill(_fill_from)
    return gave
