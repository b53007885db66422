"""Which batch sizes are measured: from one up to where computing hides the copies. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

HIDDEN = 1.1  # times resident's latency, at most: the copies are hidden
_CLEARLY = 1.25  # times the longest copies: computing hides them beyond doubt


def next_batch(done: Mapping[int, float], copy_seconds: float, most: int) -> int | None:
    """The batch size to measure resident with next; None if there are enough.

    Args:
        done: seconds by batch size.
        copy_seconds: of the bytes that the smallest budget has copied in every pass.
        most: largest batch size.
    """
    if not done:
        return 1
    last = max(done)
    if done[last] >= _CLEARLY * copy_seconds or 2 * last > most:
        return None
    return 2 * last


def telling(seconds: Mapping[int, float], copy_seconds: Iterable[float]) -> list[int]:
    """The batch sizes that tell most: the smallest, the nearest to copies of like size at each budget, the largest.

    Args:
        seconds: of resident, by batch size.
        copy_seconds: of the bytes that each budget has copied.
    """
    if not seconds:
        return []
    chosen = {min(seconds), max(seconds)}
    for copying in copy_seconds:
        if copying > 0:
            chosen.add(min(seconds, key=lambda batch: abs(math.log(seconds[batch] / copying))))
    return sorted(chosen)


def hidden(seconds: float, resident: float | None) -> bool:
    """Whether a latency is within what counts as resident's."""
    return resident is not None and seconds <= HIDDEN * resident
