"""Give a forked child the pages of program text that its parent has.

A fork copies the page tables of anonymous memory only. Text that the parent touched while importing would count as
growth of the child's resident memory the moment it runs again, as if the model had taken it.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np

_MADV_POPULATE_READ = 22  # Linux 5.14
_PRESENT = np.uint64(1 << 63)
Range = tuple[int, int]


def resident_text() -> list[Range]:
    """(address, bytes) of every run of pages of mapped files that this process has in its page tables."""
    ranges: list[Range] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            fields = line.split()
            if len(fields) < 6 or not fields[5].startswith("/") or "w" in fields[1]:
                continue
            low, high = (int(text, 16) for text in fields[0].split("-"))
            table.seek(low // mmap.PAGESIZE * 8)
            entries = np.frombuffer(table.read((high - low) // mmap.PAGESIZE * 8), dtype=np.uint64)
            edges = np.flatnonzero(np.diff(((entries & _PRESENT) != 0).astype(np.int8), prepend=0, append=0))
            ranges += [
                (low + int(first) * mmap.PAGESIZE, int(last - first) * mmap.PAGESIZE)
                for first, last in edges.reshape(-1, 2)
            ]
    return ranges


def populate(ranges: list[Range]) -> None:
    """Map those pages in this process. Nothing happens on a kernel that cannot."""
    libc = ctypes.CDLL(None)
    for address, nbytes in ranges:
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_READ)
