"""A latency that no plan can beat, whatever it keeps resident and wherever it lays the rest.

Passes follow one another and there is one storage channel, so a steady pass lasts at least as long as all of its
computing, and at least as long as all of its reading. Reading and computing cannot always overlap: from the start of
its read to its use, a block's bytes are taken. A block of s bytes can therefore not be read while a step runs that
itself needs n bytes of other blocks, if n + s exceeds the room there is for weights. For every size s, with J the
blocks of at least s bytes and F the steps that need more than room - s bytes,

    pass >= compute(F) + read(J, less what can be resident)

because no read of J overlaps any step of F (a block used by a step is in, and not being read, while it runs). Of J, at
most ``room`` bytes are resident. s = 0 gives the reading bound; s beyond every block the computing bound.
"""

from __future__ import annotations

from itertools import accumulate

from narrowboat.plan.model import Machine, Workload
from narrowboat.plan.timing import slowdown


def latency_bound(workload: Workload, machine: Machine, room: int) -> float:
    """Seconds that a steady pass takes at least.

    Args:
        room: bytes of the budget left for weights.
    """
    steps = workload.step_seconds
    total = sum(block.nbytes for block in workload.blocks)
    if machine.contention and total > room:
        # At least this much is read, and computing is slower beside it.
        densest = max((b.read_bytes / b.nbytes for b in workload.blocks if b.nbytes), default=1.0)
        least = sum(b.read_bytes for b in workload.blocks if b.holds) - room * densest
        slow = slowdown(workload, machine, max(least, 0.0) / machine.bandwidth)
        steps = tuple(seconds * slow for seconds in steps)
    compute = [seconds + machine.step_overhead for seconds in steps]
    used = [block for block in workload.blocks if block.holds]
    if total <= room:
        return sum(compute)
    need = _needed(workload, len(steps))
    # Steps by what they need, most first; blocks by size, largest first: as J grows, F shrinks.
    hungry = sorted(zip(need, compute, strict=True), reverse=True)
    spent = list(accumulate((seconds for _, seconds in hungry), initial=0.0))
    largest = sorted(used, key=lambda block: -block.nbytes)
    best, nbytes, read, at = sum(compute), 0, 0, len(hungry)
    for i, block in enumerate(largest):
        nbytes += block.nbytes
        read += block.read_bytes
        if i + 1 < len(largest) and largest[i + 1].nbytes == block.nbytes:
            continue
        while at and hungry[at - 1][0] <= room - block.nbytes:
            at -= 1
        densest = max((b.read_bytes / b.nbytes for b in largest[: i + 1] if b.nbytes), default=1.0)
        reading = max(read - room * densest, 0.0) / machine.bandwidth
        best = max(best, spent[at] + reading)
    return best


def _needed(workload: Workload, steps: int) -> list[int]:
    """Bytes of blocks that each step needs."""
    change = [0] * (steps + 1)
    for block in workload.blocks:
        for first, last in block.holds:
            change[first] += block.nbytes
            change[min(last + 1, steps)] -= block.nbytes
    return list(accumulate(change))[:steps]
