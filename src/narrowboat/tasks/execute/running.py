"""A task as the executor has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.worker import Worker
from narrowboat.tasks.job import TaskFacts


@dataclass(eq=False)
class Running:
    """A task in the executor.

    Attributes:
        facts: as the policy sees it.
        model: its network.
        source: of its inputs.
        offset: of its first release, microseconds.
        burst: jobs that may wait at once.
        overrun: what to do with a job that is over its budget: "finish", "abort" or "degrade".
        on_output: called with every output, in the task's thread's time.
        closed_loop: a job comes whenever the one before has ended, whatever the period.
    """

    facts: TaskFacts
    model: TaskModel
    source: Source
    offset: int = 0
    burst: int = 1
    overrun: str = "finish"
    on_output: Callable[[Any], None] | None = None
    closed_loop: bool = False
    released: int = 0
    ended: bool = False
    worker: Worker | None = None

    @property
    def next_release(self) -> int:
        """By the clock, never by the job before: nothing drifts."""
        return self.offset + self.released * self.facts.period

    @property
    def budget(self) -> int:
        """Of one job's segments together."""
        loads = [*self.facts.loads[1:], 0]
        return self.facts.loads[0] + sum(max(c, load) for c, load in zip(self.facts.computes, loads, strict=True))
