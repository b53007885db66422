"""Which blocks stay in memory.

In a cyclic scan a cache of the last r bytes hits nothing, while a pinned resident set of r bytes saves r bytes of
reading in every pass. So everything the window does not need is resident, and spread over the network, so that
reading goes on in the gaps: the bytes still to be streamed should come due no faster than storage delivers them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from narrowboat.plan.model import Workload

Spread = Callable[[Workload, int, frozenset[int]], frozenset[int]]


def evenly_by_bytes(workload: Workload, capacity: int, forced: frozenset[int]) -> frozenset[int]:
    """Resident blocks so that every stretch of the network streams the same share of its bytes.

    Args:
        workload: the pass.
        capacity: bytes the resident set may take.
        forced: blocks that have to be resident (already within ``capacity``).
    """
    return _follow(workload, capacity, forced, [float(block.nbytes) for block in workload.blocks])


def evenly_by_time(workload: Workload, capacity: int, forced: frozenset[int]) -> frozenset[int]:
    """Resident blocks so that the bytes to stream come due in proportion to the computing done.

    A convolutional network computes long on few bytes first and short on many bytes last; streaming the same share
    of each would leave storage idle early and late reads in the open.
    """
    steps = workload.step_seconds
    until = [0.0] * (len(workload.blocks) + 1)
    elapsed, step = 0.0, 0
    for i, block in enumerate(workload.blocks):
        first = block.holds[0][0] if block.holds else step
        while step < first:
            elapsed += steps[step]
            step += 1
        until[i] = elapsed
    until[-1] = elapsed + sum(steps[step:])
    weights = [max(until[i + 1] - until[i], 0.0) + 1e-9 for i in range(len(workload.blocks))]
    return _follow(workload, capacity, forced, weights)


def _follow(workload: Workload, capacity: int, forced: frozenset[int], pace: Sequence[float]) -> frozenset[int]:
    """Keep the cumulative streamed bytes at or below a target that grows with ``pace``; the rest is resident."""
    blocks = workload.blocks
    total = workload.weight_bytes
    to_stream = max(total - capacity, 0)
    scale = to_stream / (sum(pace) or 1.0)
    resident = set(forced)
    room = capacity - sum(blocks[i].nbytes for i in forced)
    target = streamed = 0.0
    for i, block in enumerate(blocks):
        target += pace[i] * scale
        if i in resident or not block.holds:
            continue
        # A block used several times per pass would be read several times: keeping it saves more per byte.
        keep = streamed + block.nbytes / 2 > target or len(block.holds) > 1
        if keep and block.nbytes <= room:
            resident.add(i)
            room -= block.nbytes
        else:
            streamed += block.nbytes
    # What is left of the room goes to the blocks that save the most reading per pass.
    for i in sorted(
        (i for i in range(len(blocks)) if i not in resident and blocks[i].holds),
        key=lambda i: (-len(blocks[i].holds), -blocks[i].nbytes, i),
    ):
        if blocks[i].nbytes <= room:
            resident.add(i)
            room -= blocks[i].nbytes
    return frozenset(resident)
