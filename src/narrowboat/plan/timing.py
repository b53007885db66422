"""How long a pass takes: the max-plus recurrence of reading and computing, with addresses in place of slots.

One storage channel reads in the order of use; a read may start as soon as every block whose addresses it takes
over has been used for the last time before it:

    in_done[j] = max(in_done[j-1], released[j]) + read[j]
    ex_done[k] = max(ex_done[k-1], in_done of all blocks held at step k) + compute[k]

``released[j]`` is the end of the last step that holds a block overlapping block j. With equal slots that is the
recurrence of Demand Layering and SwapNet (``ex_done[j-m]``); with addresses it is its byte form. Passes follow one
another: reading for the next begins while this one still computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from narrowboat.plan.layout import overlaps
from narrowboat.plan.model import Machine, Workload


@dataclass(frozen=True, slots=True)
class Timing:
    """Prediction for one pass in the steady state.

    Attributes:
        latency: seconds from the start of a pass to its end, passes back to back.
        stall: seconds of it spent waiting for weights (the residual delay).
        stall_by_block: the same by index of the block waited for.
        bytes_read: bytes read from storage per pass.
        compute: seconds of computing per pass.
    """

    latency: float
    stall: float
    stall_by_block: dict[int, float]
    bytes_read: int
    compute: float


def slowdown(workload: Workload, machine: Machine, reading: float) -> float:
    """The factor by which a pass computes longer beside ``reading`` seconds of reading."""
    compute = sum(workload.step_seconds)
    return 1 + machine.contention * min(reading / compute, 1.0) if compute else 1.0


def simulate(
    workload: Workload,
    machine: Machine,
    resident: Collection[int],
    streamed: Sequence[int],
    offsets: Sequence[int],
    passes: int = 4,
) -> Timing:
    """Run ``passes`` passes back to back and report the last.

    Args:
        resident: indices of the blocks that stay in (they cost nothing).
        streamed: indices of the others, in order of first use, and
        offsets: their place in the window, in the same order.
        passes: how many passes until the steady state is taken as reached.
    """
    blocks = [workload.blocks[i] for i in streamed]
    meets = overlaps(blocks, offsets)
    wanted = sorted((first, last, k) for k, block in enumerate(blocks) for first, last in block.holds)
    cost = [block.read_bytes / machine.bandwidth + machine.read_latency for block in blocks]
    slow = slowdown(workload, machine, sum(c * len(b.holds) for c, b in zip(cost, blocks, strict=True)))
    steps = [seconds * slow for seconds in workload.step_seconds]
    compute = sum(steps) + machine.step_overhead * len(steps)

    released = [0.0] * len(blocks)  # when the block's last hold so far ended
    inside = [False] * len(blocks)
    reader = 0.0
    now = 0.0
    latency, stall, bytes_read = compute, 0.0, 0
    by_block: dict[int, float] = {}
    # Reads are issued in order of use, so walking the uses in order computes both chains in one sweep. Within a
    # step all reads are due at its start; the release time of a block is the end of its hold.
    prefix = [0.0]
    for seconds in steps:
        prefix.append(prefix[-1] + seconds + machine.step_overhead)
    for _ in range(passes):
        begin = now
        origin = now  # time at which step 0 would have begun had there been no stall since
        pass_stall, pass_bytes = 0.0, 0
        by_block = {}
        pending: list[tuple[int, int]] = []  # (last step, block) holds whose end is not dated yet
        for first, last, k in wanted:
            still: list[tuple[int, int]] = []
            for end, other in pending:
                if end < first:
                    released[other] = origin + prefix[end + 1]
                else:
                    still.append((end, other))
            pending = still
            if not inside[k]:
                ready = reader
                for other in meets[k]:
                    inside[other] = False
                    ready = max(ready, released[other])
                reader = ready + cost[k]
                pass_bytes += blocks[k].read_bytes
                inside[k] = True
                due = origin + prefix[first]
                if reader > due:
                    origin += reader - due
                    pass_stall += reader - due
                    by_block[streamed[k]] = by_block.get(streamed[k], 0.0) + reader - due
            pending.append((last, k))
        for end, other in pending:
            released[other] = origin + prefix[end + 1]
        now = origin + prefix[-1]
        latency, stall, bytes_read = now - begin, pass_stall, pass_bytes
    return Timing(latency, stall, by_block, bytes_read, compute)
