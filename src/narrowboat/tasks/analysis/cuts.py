"""Where to cut a network into blocks so that its jobs are short and can be preempted often enough."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from narrowboat.tasks.analysis.model import Block


def merge(units: Sequence[Block], ends: Sequence[int]) -> list[Block]:
    """Blocks of consecutive units; ``ends`` are the places one past each block's last unit."""
    blocks: list[Block] = []
    start = 0
    for end in ends:
        group = units[start:end]
        blocks.append(Block(sum(u.load for u in group), sum(u.compute for u in group), sum(u.nbytes for u in group)))
        start = end
    return blocks


def balanced_cuts(
    units: Sequence[Block], *, longest: int | None = None, room: int | None = None, overhead: int = 0
) -> list[int] | None:
    """The cuts with the shortest job, ``L1 + sum of max(C_j, L_j+1) + C_n``, under a largest segment.

    Dynamic programming over (where the last block begins, where it ends): exact, O(n^3) in numpy's hands.

    Args:
        units: what cannot be cut further, in order.
        longest: no segment may be longer, its overhead included; None for no limit.
        room: no two consecutive blocks together may have more bytes; None for no limit.
        overhead: time of one boundary, charged to every segment: what keeps blocks from being too small.

    Returns:
        The end of each block, or None if no cuts keep the limits.
    """
    count = len(units)
    if not count:
        return []
    cap = np.inf if longest is None else float(longest)
    space = np.inf if room is None else float(room)
    load = np.cumsum([0, *(unit.load for unit in units)]).astype(float)
    compute = np.cumsum([0, *(unit.compute for unit in units)]).astype(float)
    nbytes = np.cumsum([0, *(unit.nbytes for unit in units)]).astype(float)
    # cost[i, j]: of all segments before the compute of the last block, which is units i to j.
    cost = np.full((count + 1, count + 1), np.inf)
    before = np.full((count + 1, count + 1), -1, dtype=np.int64)
    for end in range(1, count + 1):
        first = load[end] + overhead if load[end] else 0.0
        if first <= cap and nbytes[end] <= space:
            cost[0, end] = first
    for middle in range(1, count):
        # Blocks h..middle, then middle..end, for all h and all ends at once.
        computing = compute[middle] - compute[:middle]
        loading = load[middle + 1 :] - load[middle]
        length = np.maximum(computing[:, None], loading[None, :]) + overhead
        together = nbytes[middle + 1 :][None, :] - nbytes[:middle][:, None]
        total = np.where((length <= cap) & (together <= space), cost[:middle, middle][:, None] + length, np.inf)
        best = total.argmin(axis=0)
        cost[middle, middle + 1 :] = total[best, np.arange(count - middle)]
        before[middle, middle + 1 :] = best
    tail = compute[count] - compute[:count] + overhead
    totals = np.where(tail <= cap, cost[:count, count] + tail, np.inf)
    start = int(totals.argmin())
    if not np.isfinite(totals[start]):
        return None
    ends, end = [count], count
    while start > 0:
        ends.append(start)
        start, end = int(before[start, end]), start
    return ends[::-1]
