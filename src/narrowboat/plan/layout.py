"""Where each streamed block lies in the window: overlays on a ring.

Blocks that are never needed together may share addresses. An address is fixed for as long as the plan is in
force, so that a parameter is bound to it once. Blocks are laid round a ring in order of first use: the one whose
place is taken next is then the one whose use is longest past.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from narrowboat.plan.model import Block


def concurrent_sets(blocks: Sequence[Block]) -> list[set[int]]:
    """For each block, the indices of the blocks that are held during one of its own holds."""
    intervals = sorted((first, last, i) for i, block in enumerate(blocks) for first, last in block.holds)
    starts = [interval[0] for interval in intervals]
    together: list[set[int]] = [set() for _ in blocks]
    for position, (_, last, i) in enumerate(intervals):
        for _, _, j in intervals[position + 1 : bisect_right(starts, last)]:
            if i != j:
                together[i].add(j)
                together[j].add(i)
    return together


def peak_held(blocks: Sequence[Block]) -> tuple[int, int]:
    """``(bytes, step)``: the most bytes that have to be in at once, and the first step where they do."""
    changes: dict[int, int] = {}
    for block in blocks:
        for first, last in block.holds:
            changes[first] = changes.get(first, 0) + block.nbytes
            changes[last + 1] = changes.get(last + 1, 0) - block.nbytes
    held, best, where = 0, 0, 0
    for step in sorted(changes):
        held += changes[step]
        if held > best:
            best, where = held, step
    return best, where


def place(blocks: Sequence[Block], window: int) -> list[int] | None:
    """Offsets in ``[0, window)`` for ``blocks``, in order of first use; None if they do not fit.

    Blocks needed together never overlap. Each block goes to the ring's hand if it fits there, else to the lowest
    address where it fits.
    """
    together = concurrent_sets(blocks)
    offsets: list[int] = []
    hand = 0
    for i, block in enumerate(blocks):
        taken = sorted((offsets[j], offsets[j] + blocks[j].nbytes) for j in together[i] if j < i)
        offset = None
        for start in (hand, 0):
            offset = _first_fit(taken, start, block.nbytes, window)
            if offset is not None:
                break
        if offset is None:
            return None
        offsets.append(offset)
        hand = offset + block.nbytes
    return offsets


def place_apart(blocks: Sequence[Block], window: int) -> list[int] | None:
    """Offsets as ``place`` gives them, with the largest blocks in a zone of their own; None if there are none such.

    A block that takes most of a ring meets every other: it can only be read when all of them have been used. Where
    what it leaves is enough for the others, they go round there, and it comes in beside them.
    """
    zone = max((block.nbytes for block in blocks), default=0)
    if zone * 2 <= window or zone >= window:
        return None
    inner = [i for i, block in enumerate(blocks) if block.nbytes > window - zone]
    outer = [i for i, block in enumerate(blocks) if block.nbytes <= window - zone]
    below, above = place([blocks[i] for i in inner], zone), place([blocks[i] for i in outer], window - zone)
    if below is None or above is None or not outer:
        return None
    offsets = [0] * len(blocks)
    for i, offset in zip(inner, below, strict=True):
        offsets[i] = offset
    for i, offset in zip(outer, above, strict=True):
        offsets[i] = zone + offset
    return offsets


def _first_fit(taken: list[tuple[int, int]], start: int, nbytes: int, window: int) -> int | None:
    for low, high in taken:
        if start + nbytes <= low:
            break
        start = max(start, high)
    return start if start + nbytes <= window else None
