"""Where in the window a weight goes, and which others go for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

PINNED = -math.inf  # the farness of what must stay


class Taken(NamedTuple):
    """Bytes ``[start, stop)`` that are in use, and how far away the next use of them is."""

    start: int
    stop: int
    farness: float


class Place(NamedTuple):
    """A place at ``start``, for which ``taken[first:last]`` have to go."""

    start: int
    first: int
    last: int


def find_place(taken: Sequence[Taken], high: int, need: int, *, low: int = 0, beyond: float = -1.0) -> Place | None:
    """The place of ``need`` bytes that costs least: those that go for it are needed again latest.

    Belady's rule (1966) for tenants of many sizes: of all places, the one whose soonest needed tenant is needed
    latest; of equals, the one where fewest bytes go; of equals, the hole that fits best.

    Args:
        taken: in order of ``start``, without overlap, within ``[low, high)``.
        high: end of the window, bytes.
        need: bytes.
        low: beginning of the window, bytes.
        beyond: nobody goes who is needed within so many touches (what is fetched ahead must not push out what is
            needed sooner).

    Returns:
        None if there is no such place.
    """
    best: tuple[tuple[float, int, int], Place] | None = None
    # A place that begins in the middle of a hole is never better than the hole's beginning.
    for first, start in enumerate([low, *(each.stop for each in taken)]):
        stop = start + need
        if stop > high:
            break
        nearest, evicted, last = math.inf, 0, first
        while last < len(taken) and taken[last].start < stop and nearest > beyond:
            nearest = min(nearest, taken[last].farness)
            evicted += taken[last].stop - taken[last].start
            last += 1
        if nearest <= beyond:
            continue
        left_over = (taken[last].start if last < len(taken) else high) - stop
        score = (nearest, -evicted, -left_over)
        if best is None or score > best[0]:
            best = score, Place(start, first, last)
    return None if best is None else best[1]
