"""A latency that no plan can beat, whatever it keeps resident and wherever it lays the rest.

Passes follow one another and there is one storage channel. Take any stretch of steps of a pass, and the blocks first
used in it. When it begins, the blocks of the step before are still in, and what they leave of ``room``, free bytes, is
all that those of the stretch can have; a block larger than that is not even on its way. The others arrive while the
stretch lasts:

    arrive(stretch) >= bytes(stretch) - free, for blocks larger than free: bytes(stretch)

Reading and computing cannot always overlap: from the start of its read to its use, a block's bytes are taken. A block
of s bytes can therefore not be read while a step runs that itself needs n bytes of other blocks, if n + s exceeds the
room there is for weights. For every size s, let J be the blocks of at least s bytes and F the steps that need more
than room - s bytes: no read of J overlaps any step of F (a block used by a step is in, and not being read, while it
runs). So what of J's arriving the other steps of the stretch, at their busy pace, cannot cover is waited for:

    wait(stretch) >= arrive(J) / bandwidth - busy(all but F)

A pass cut into stretches waits for the sum; the cut with the largest is found by dynamic programming. s = 0 gives the
reading bound. What is read and not waited for is read beside steps, and slows them: a second of reading beside step k
costs 1 - idle[k] / busy[k] seconds, and it costs least beside the steps that mind it least. Waiting costs a whole
second per second, so the least waiting is best:

    pass >= compute + wait + slowdown(read(all, less what can be resident) - wait)

A block used more than once may be in from another use: such blocks are left out of the stretches.

On a device there are two channels (see ``timing``), and the argument holds for each of them alone. Copying: all
blocks that come in, cached or not, take their nbytes / copy_bandwidth of that channel one after the other, each
between its place being free and its use. Storage: all blocks that are not cached are read one after the other, each
between its place on the device being free, which is its own from then on, and its use. Those that are cached are
missing from what the stretches of a pass read: at most host_room bytes in all, and every byte of them makes what is
shown shorter by 1 / bandwidth at most, in the one stretch that it is of. So

    wait(storage, with a host cache) >= wait(storage, with none) - host_room / bandwidth

(To give the storage channel room + host_room would also be sound, and show less: it spares host_room in every stretch
of a cut.) A pass waits for as long as either channel makes it wait, and nothing slows the steps of a device.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate, pairwise

from narrowboat.plan.model import Block, Machine, Workload
from narrowboat.plan.timing import busy_seconds

_SIZES, _CUTS = 8, 100  # how many are looked at


def latency_bound(workload: Workload, machine: Machine, room: int) -> float:
    """Seconds that a steady pass takes at least (one after a pause, where the workload says so).

    Args:
        room: bytes of the budget left for weights.
    """
    idle = [seconds + machine.step_overhead for seconds in workload.step_seconds]
    if sum(block.nbytes for block in workload.blocks) <= room:
        return sum(idle)
    busy = [seconds + machine.step_overhead for seconds in busy_seconds(workload, machine)]
    used = sorted((block for block in workload.blocks if block.holds), key=lambda block: -block.nbytes)
    wait = _least_wait(workload, machine, room, busy, used)
    if machine.copy_bandwidth:
        copier = replace(machine, bandwidth=machine.copy_bandwidth)
        copied = [replace(block, read_bytes=block.nbytes) for block in used]
        spared = machine.host_room / machine.bandwidth
        return sum(idle) + max(_least_wait(workload, copier, room, busy, copied), wait - spared)
    reading = _least_reading(used, machine, room)
    return sum(idle) + wait + _slowdown(idle, busy, reading - wait)


def _least_wait(workload: Workload, machine: Machine, room: int, busy: list[float], largest: list[Block]) -> float:
    """Seconds of waiting of the cut of the pass that shows most.

    Args:
        busy: seconds of each step beside a read.
        largest: the blocks that are used, largest first.
    """
    if not largest:
        return 0.0
    firsts = sorted({0, *(block.holds[0][0] for block in largest)})
    cuts = firsts[:: -(-len(firsts) // _CUTS)]
    need = _needed(workload, len(busy))
    sizes = sorted({block.nbytes for block in largest})
    # Any choice of sizes, cuts and first cut gives a bound.
    curves = [_Curve(cuts, need, busy, largest, room, size) for size in (0, *sizes[:: -(-len(sizes) // _SIZES)])]
    if workload.from_idle:  # it begins where it begins, with all of the room in use
        return _shown(curves, machine, room, cuts, need, largest, 0, full=True)
    neediest = max(range(len(cuts)), key=lambda at: need[cuts[at] - 1])
    return max(_shown(curves, machine, room, cuts, need, largest, at) for at in {0, neediest})


def _shown(
    curves: list[_Curve],
    machine: Machine,
    room: int,
    cuts: list[int],
    need: list[int],
    blocks: list[Block],
    at: int,
    *,
    full: bool = False,
) -> float:
    """Seconds of waiting shown by the best choice of ``cuts``, the pass taken to begin at the one numbered ``at``.

    Args:
        full: nothing of the pass before is left then, but what is of use.
    """
    count = len(cuts)
    order = [*range(at, count), *range(at)]
    free = [room - need[cuts[number] - 1] for number in order]  # before the first step comes the last
    if full:
        free[0] = room
    again = [_comes_again(number, cuts, len(need), blocks) for number in order]
    sums = [curve.sums(order) for curve in curves]
    best = [0.0] * (count + 1)  # by cut: the most waiting shown before it
    for end in range(1, count + 1):
        found = best[end - 1]
        for begin in range(end):
            room_at = room if end - begin > again[begin] else free[begin]
            for curve, (nbytes, covered) in zip(curves, sums, strict=True):
                arriving = nbytes[end] - nbytes[begin]
                if curve.size <= room_at:
                    arriving -= room_at
                if arriving > 0:
                    wait = best[begin] + arriving / machine.bandwidth - (covered[end] - covered[begin])
                    if wait > found:
                        found = wait
        best[end] = found
    return best[-1]


def _comes_again(number: int, cuts: list[int], steps: int, blocks: list[Block]) -> int:
    """How many cuts after the one numbered ``number`` a block of the step before it is used again.

    A stretch that reaches so far may have kept it.
    """
    before = (cuts[number] - 1) % steps
    held = (block for block in blocks if any(first <= before <= last for first, last in block.holds))
    return min(((bisect_right(cuts, b.holds[0][0]) - 1 - number) % len(cuts) for b in held), default=len(cuts))


class _Curve:
    """For one size, by cut: the blocks that large first used from there on, and the steps beside which they can load.

    Attributes:
        size: bytes.
    """

    def __init__(
        self, cuts: list[int], need: list[int], busy: list[float], blocks: list[Block], room: int, size: int
    ) -> None:
        self.size = size
        self._nbytes = [0] * len(cuts)
        for block in blocks:
            if block.nbytes >= size and len(block.holds) == 1:
                self._nbytes[bisect_right(cuts, block.holds[0][0]) - 1] += min(block.nbytes, block.read_bytes)
        spare = accumulate((s if n <= room - size else 0.0 for n, s in zip(need, busy, strict=True)), initial=0.0)
        until = list(spare)
        self._covered = [until[end] - until[begin] for begin, end in pairwise((*cuts, len(busy)))]

    def sums(self, order: list[int]) -> tuple[list[int], list[float]]:
        """Bytes of the blocks, and seconds of the steps at their busy pace, before each cut in ``order``."""
        return (
            list(accumulate((self._nbytes[i] for i in order), initial=0)),
            list(accumulate((self._covered[i] for i in order), initial=0.0)),
        )


def _least_reading(blocks: list[Block], machine: Machine, room: int) -> float:
    """Seconds of reading ``blocks`` in a pass with the costliest per byte resident, parts of blocks too."""
    cost = [(b.read_bytes / machine.bandwidth + machine.read_latency, b.nbytes) for b in blocks]
    reading = sum(seconds for seconds, _ in cost)
    for seconds, nbytes in sorted(cost, key=lambda c: c[0] / max(c[1], 1), reverse=True):
        if nbytes >= room:
            return reading - seconds * room / max(nbytes, 1)
        reading -= seconds
        room -= nbytes
    return reading


def _slowdown(idle: list[float], busy: list[float], reading: float) -> float:
    """Seconds by which ``reading`` seconds of reading slow the steps at least."""
    cost, left = 0.0, reading
    for share, seconds in sorted((1 - i / b, b) for i, b in zip(idle, busy, strict=True) if b > 0):
        if left <= 0:
            break
        cost += max(share, 0.0) * min(seconds, left)
        left -= seconds
    return cost


def _needed(workload: Workload, steps: int) -> list[int]:
    """Bytes of blocks that each step needs."""
    change = [0] * (steps + 1)
    for block in workload.blocks:
        for first, last in block.holds:
            change[first] += block.nbytes
            change[min(last + 1, steps)] -= block.nbytes
    return list(accumulate(change))[:steps]
