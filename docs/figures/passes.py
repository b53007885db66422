"""A small network for the figures, and every read and step of its passes, by the recurrence of ``plan.timing``.

The planner's own simulation says how long a pass takes, and not when each thing happens. So it is written out here,
and :func:`events` refuses to return anything that does not end when the simulation says.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose

from narrowboat.plan.make import make_plan
from narrowboat.plan.model import Block, Machine, Workload
from narrowboat.plan.result import Plan

MIB = 1 << 20
MACHINE = Machine(bandwidth=500 * MIB, read_latency=0.0)  # a mebibyte in two milliseconds
FIXED = 12 * MIB  # activations and what else is always there

# Twelve layers as a convolutional network has them: long steps with few bytes first, short ones with many last.
_MIB = (5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10)
_MILLISECONDS = (8, 8, 8, 7, 7, 7, 6, 6, 6, 5, 5, 5)
WORKLOAD = Workload(
    blocks=tuple(Block(f"b{k}", size * MIB, size * MIB, ((k, k),)) for k, size in enumerate(_MIB)),
    step_seconds=tuple(ms / 1e3 for ms in _MILLISECONDS),
    fixed_bytes=FIXED,
)


def plan_for(mebibytes: float) -> Plan:
    """The planner's answer for the small network."""
    return make_plan(WORKLOAD, MACHINE, int(mebibytes * MIB), thorough=True)


@dataclass(frozen=True)
class Event:
    """One read or one step.

    Attributes:
        kind: ``"read"``, ``"compute"`` or ``"wait"``.
        block: its number.
        begin, end: seconds.
        until: of a read, when the bytes have been used for the last time.
    """

    kind: str
    block: int
    begin: float
    end: float
    until: float = 0.0


def events(plan: Plan, passes: int = 4) -> list[list[Event]]:
    """Of each pass, back to back, what happens in it; reads stand with the pass they are for."""
    blocks, seconds = WORKLOAD.blocks, WORKLOAD.step_seconds
    inside: dict[int, float] = {}  # block: end of the step that used it last
    told: list[list[Event]] = []
    channel = now = begin = 0.0
    computing: dict[tuple[int, int], float] = {}
    for number in range(passes):
        begin, here = now, []
        for k, step in enumerate(seconds):
            if k not in plan.resident:
                if k not in inside:
                    low, high = plan.offsets[k], plan.offsets[k] + blocks[k].nbytes
                    over = [o for o in inside if plan.offsets[o] < high and low < plan.offsets[o] + blocks[o].nbytes]
                    start = max([channel, *(inside.pop(o) for o in over)])
                    channel = start + blocks[k].read_bytes / MACHINE.bandwidth
                    here.append(Event("read", k, start, channel))
                    if channel > now:
                        here.append(Event("wait", k, now, channel))
                        now = channel
                inside[k] = now + step
            computing[number, k] = now + step
            here.append(Event("compute", k, now, now + step))
            now += step
        told.append(here)
    if not isclose(now - begin, plan.predicted_latency, rel_tol=1e-6):
        raise AssertionError(f"drawn {now - begin} s, planned {plan.predicted_latency} s")
    return [
        [
            Event(e.kind, e.block, e.begin, e.end, computing[number, e.block] if e.kind == "read" else 0.0)
            for e in pass_
        ]
        for number, pass_ in enumerate(told)
    ]
