"""What each block of a pass took beside what was predicted of it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from narrowboat.plan.model import Block
from narrowboat.stream.passes import PassRecord
from narrowboat.stream.session import Session


def step_owners(blocks: Sequence[Block], steps: int) -> list[int]:
    """By step, the block whose computing it is counted as: of those that are held then, the one that came in last.

    Blocks are held over several steps and overlap; so every step counts once. -1 where none is held.
    """
    owners, since = [-1] * steps, [-1] * steps
    for number, block in enumerate(blocks):
        for first, last in block.holds:
            for step in range(first, min(last + 1, steps)):
                if first > since[step]:
                    owners[step], since[step] = number, first
    return owners


class BlockTimes:
    """Collects passes of a session; made anew when another plan is in force.

    Args:
        session: of the model.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._plan = session.plan
        self._passes: list[tuple[list[float], dict[str, float]]] = []

    def note(self, record: PassRecord) -> None:
        """A pass has ended; its details are still there."""
        if self._session.plan is not self._plan:  # what was measured before belongs to other blocks
            self._plan, self._passes = self._session.plan, []
            return
        if record.complete and record.step_seconds:
            self._passes.append((list(record.step_seconds), dict(record.stall_by_block)))

    def rows(self) -> list[dict[str, Any]]:
        """Per block in order of first use; milliseconds and bytes; measured times are medians, None without a pass.

        The prediction of a step is its idle time, scaled so that the steps add up to the computing that the plan
        predicts: which steps share the machine with reads is not kept.
        """
        plan = self._plan
        workload, _ = self._session.prepared.workload()
        idle = list(workload.step_seconds)
        owners = step_owners(plan.blocks, len(idle))
        scale = plan.timing.compute / sum(idle) if sum(idle) else 1.0
        seen = [(steps, stalls) for steps, stalls in self._passes if len(steps) == len(idle)]
        rows = []
        for number, block in enumerate(plan.blocks):
            mine = [step for step, owner in enumerate(owners) if owner == number]
            compute = [sum(steps[step] for step in mine) for steps, _ in seen]
            stall = [stalls.get(block.name, 0.0) for _, stalls in seen]
            rows.append(
                {
                    "name": block.name,
                    "bytes": block.nbytes,
                    "read_bytes": block.read_bytes,
                    "resident": number in plan.resident,
                    "predicted_compute_ms": sum(idle[step] for step in mine) * scale * 1e3,
                    "compute_ms": statistics.median(compute) * 1e3 if compute else None,
                    "predicted_stall_ms": plan.timing.stall_by_block.get(number, 0.0) * 1e3,
                    "stall_ms": statistics.median(stall) * 1e3 if stall else None,
                }
            )
        return rows


def block_times(session: Session) -> list[dict[str, Any]]:
    """The same from a session's last pass alone, the only one of which it keeps the details."""
    times = BlockTimes(session)
    if session.records:
        times.note(session.records[-1])
    return times.rows()
