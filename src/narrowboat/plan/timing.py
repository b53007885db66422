"""How long a pass takes: the max-plus recurrence of reading and computing, with addresses in place of slots.

One storage channel reads in the order of use; a read may start as soon as every block whose addresses it takes
over has been used for the last time before it:

    in_done[j] = max(in_done[j-1], released[j]) + read[j]
    ex_done[k] = max(ex_done[k-1], in_done of all blocks held at step k) + compute[k]

``released[j]`` is the end of the last step that holds a block overlapping block j. With equal slots that is the
recurrence of Demand Layering and SwapNet (``ex_done[j-m]``); with addresses it is its byte form. Passes follow one
another: reading for the next begins while this one still computes.

Memory and cores are shared, so a step that computes beside a read takes longer: ``compute[k]`` is its idle time while
the channel rests and its busy time while it reads, in proportion.

On a device there are two channels in series: storage to pinned host memory, host memory to the device. Both work in
the order of submission, and a block is submitted when its place is free and those before it have been submitted. A
block travels in chunks, so that it is copied while it is read, but for its last chunk; one with a copy in host memory
is only copied:

    read_done[j] = max(read_done[j-1], released[j]) + read[j]                                  (not for cached blocks)
    in_done[j]   = max(max(in_done[j-1], released[j]) + copy[j], read_done[j] + last_chunk[j])

That a copy cannot begin before the first chunk has been read is left out: it matters where copying is the slower of
the two. Copies and reads leave a device's computing alone: there is no busy time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from narrowboat.plan.model import Machine, Workload
from narrowboat.plan.tiers import host_set


@dataclass(frozen=True, slots=True)
class Timing:
    """Prediction for one pass in the steady state.

    Attributes:
        latency: seconds from the start of a pass to its end, passes back to back or after a pause (``from_idle``).
        stall: seconds of it spent waiting for weights (the residual delay).
        stall_by_block: the same by index of the block waited for.
        bytes_read: bytes read from storage per pass.
        compute: seconds of computing per pass.
        beside_reading: seconds of computing during which storage was read (on a device: weights were on their way).
        bytes_copied: bytes copied from host memory to the device per pass; 0 without a device stage.
    """

    latency: float
    stall: float
    stall_by_block: dict[int, float]
    bytes_read: int
    compute: float
    beside_reading: float = 0.0
    bytes_copied: int = 0


@dataclass(slots=True)
class Lead:
    """How the reads (or copies to the device) of the last pass came, by block: what a search looks at.

    Attributes:
        early: seconds between a block's arrival and its use; negative: waited for.
        rested: blocks before whose read the channel had nothing to do, for want of room.
    """

    early: dict[int, float] = field(default_factory=dict)
    rested: set[int] = field(default_factory=set)


def busy_seconds(workload: Workload, machine: Machine) -> Sequence[float]:
    """Seconds of each step while storage is read all along, bookkeeping left out; on a device, as ever."""
    if machine.copy_bandwidth:
        return workload.step_seconds
    if workload.busy_seconds:
        return workload.busy_seconds
    return [seconds * (1 + machine.contention) for seconds in workload.step_seconds]


def simulate(
    workload: Workload,
    machine: Machine,
    resident: Collection[int],
    streamed: Sequence[int],
    offsets: Sequence[int],
    passes: int = 4,
    lead: Lead | None = None,
    cached: Collection[int] | None = None,
) -> Timing:
    """Run ``passes`` passes back to back, or as ``workload.from_idle`` has it, and report the last.

    Args:
        resident: indices of the blocks that stay in (they cost nothing).
        streamed: indices of the others, in order of first use, and
        offsets: their place in the window, in the same order.
        passes: how many passes until the steady state is taken as reached.
        lead: if given, takes what is seen of the reads.
        cached: on a device, indices of the streamed blocks with a copy in host memory; None: as ``host_set`` has it.
    """
    overhead = machine.step_overhead
    if not streamed:
        compute = sum(workload.step_seconds) + overhead * len(workload.step_seconds)
        return Timing(compute, 0.0, {}, 0, compute)
    blocks = [workload.blocks[i] for i in streamed]
    if not machine.copy_bandwidth:
        cost = [block.read_bytes / machine.bandwidth + machine.read_latency for block in blocks]
        stages: list[tuple[float, float] | None] = []
    else:
        cost = [block.nbytes / machine.copy_bandwidth + machine.copy_latency for block in blocks]
        if cached is None:
            cached = host_set(workload, machine, streamed)
        stages = _stages(workload, machine, streamed, cached)
    holds = sorted((first, last, k) for k, block in enumerate(blocks) for first, last in block.holds)
    order = [k for _, _, k in holds]
    count = len(order)

    # Stretches of steps in which no hold begins or ends.
    turns = sorted({0, *(first for first, _, _ in holds), *(last + 1 for _, last, _ in holds)})
    begins: dict[int, list[tuple[int, int]]] = {}
    ends: dict[int, list[int]] = {}
    for first, last, k in holds:
        begins.setdefault(first, []).append((last, k))
        ends.setdefault(last + 1, []).append(k)
    steps = len(workload.step_seconds)
    busy_of = busy_seconds(workload, machine)
    stretches: list[tuple[float, float, list[int], list[tuple[int, int]]]] = []
    for at, turn in enumerate(turns):
        if turn >= steps > 0:
            break
        until = min(turns[at + 1], steps) if at + 1 < len(turns) else steps
        idle = sum(workload.step_seconds[turn:until]) + overhead * (until - turn)
        busy = sum(busy_of[turn:until]) + overhead * (until - turn)
        released = ends.get(turn, []) if turn else []
        stretches.append((idle, busy, released, begins.get(turn, [])))
    at_end = [k for step, ended in ends.items() if step >= steps for k in ended]

    inside = [False] * len(blocks)
    starts: list[int] = []  # where the blocks inside lie, which never overlap, ascending
    there: list[int] = []  # and which they are
    arrives = [0.0] * len(blocks)
    wanted = [0] * len(blocks)  # uses a block has been provided for, and that it is held by
    head = cursor = 0  # uses begun and uses provided for, counted over passes
    arrived = read_done = now = 0.0  # arrived: in_done of the block submitted last
    latency, stall, bytes_read, bytes_copied, compute, beside = 0.0, 0.0, 0, 0, 0.0, 0.0
    by_block: dict[int, float] = {}
    for number in range(passes):
        begin = now
        watched = lead if number == passes - 1 else None
        stall, bytes_read, bytes_copied, compute, beside, by_block = 0.0, 0, 0, 0.0, 0.0, {}
        for at_turn, (idle, busy, released, beginning) in enumerate(stretches):
            for k in released:
                wanted[k] -= 1
            limit = head + count + len(beginning)
            while cursor < limit:
                k = order[cursor % count]
                if not inside[k]:
                    low, high = offsets[k], offsets[k] + blocks[k].nbytes
                    at = bisect_right(starts, low)
                    if at and starts[at - 1] + blocks[there[at - 1]].nbytes > low:
                        at -= 1
                    end = bisect_left(starts, high, at)
                    if any(wanted[other] for other in there[at:end]):
                        break
                    for other in there[at:end]:
                        inside[other] = False
                    starts[at:end] = [low]
                    there[at:end] = [k]
                    if watched is not None and arrived < now:
                        watched.rested.add(streamed[k])
                    arrived = (arrived if arrived > now else now) + cost[k]
                    if not stages:
                        bytes_read += blocks[k].read_bytes
                    else:
                        bytes_copied += blocks[k].nbytes
                        stage = stages[k]
                        if stage is not None:
                            read_done = max(read_done, now) + stage[0]
                            arrived = max(arrived, read_done + stage[1])
                            bytes_read += blocks[k].read_bytes
                    arrives[k] = arrived
                    inside[k] = True
                wanted[k] += 1
                cursor += 1
            if workload.from_idle and not at_turn:
                begin = now = max(now, arrived)  # what was asked for has come
            for _, k in beginning:
                if watched is not None:
                    watched.early[streamed[k]] = min(
                        now - arrives[k], watched.early.get(streamed[k], now - arrives[k])
                    )
                if arrives[k] > now:
                    waited = arrives[k] - now
                    stall += waited
                    by_block[streamed[k]] = by_block.get(streamed[k], 0.0) + waited
                    now = arrives[k]
            head += len(beginning)
            reading = arrived - now
            if reading <= 0.0 or busy <= 0.0:
                spent, reading = idle, 0.0
            elif reading >= busy:
                spent = reading = busy
            else:
                spent = reading + idle * (1 - reading / busy) if busy != idle else idle
            now += spent
            compute += spent
            beside += reading
        for k in at_end:
            wanted[k] -= 1
        latency = now - begin
    return Timing(latency, stall, by_block, bytes_read, compute, beside, bytes_copied)


def _stages(
    workload: Workload, machine: Machine, streamed: Sequence[int], cached: Collection[int]
) -> list[tuple[float, float] | None]:
    """Of each streamed block, seconds of reading it and of copying its last chunk to the device; None where cached."""
    stages: list[tuple[float, float] | None] = []
    for i in streamed:
        block = workload.blocks[i]
        read = block.read_bytes / machine.bandwidth + machine.read_latency
        last_chunk = min(block.nbytes, machine.chunk) / machine.copy_bandwidth + machine.copy_latency
        stages.append(None if i in cached else (read, last_chunk))
    return stages
