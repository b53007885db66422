"""How fast the weights file itself reads, in a few milliseconds, before the first plan is made."""

from __future__ import annotations

import time
from collections.abc import Sequence

from narrowboat.arena.slab import Slab
from narrowboat.stream.reader import PAGE, Extent, Reader, WeightsFile

_SAMPLE = 16 << 20  # bytes
_PIECE = 1 << 20


def quick_bandwidth(reader: Reader, files: Sequence[WeightsFile]) -> float:
    """Bytes per second of reading a few megabytes of the largest weights file; 1 GB/s for a file below one."""
    number = max(range(len(files)), key=lambda i: files[i].stamp.size)
    sample = min(files[number].stamp.size // PAGE * PAGE, _SAMPLE)
    if sample < _PIECE:
        return 1e9
    scratch = Slab(_PIECE * 2)
    try:
        start = time.perf_counter()
        jobs = [
            reader.submit("probe", scratch, [Extent(number, at, _PIECE, (at // _PIECE % 2) * _PIECE)])
            for at in range(0, sample - _PIECE + 1, _PIECE)
        ]
        for job in jobs:
            reader.wait(job)
        return len(jobs) * _PIECE / (time.perf_counter() - start)
    finally:
        reader.drain()
        scratch.close()
