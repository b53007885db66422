"""A task as the executor has it, and a job of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from narrowboat.tasks.contract import Bucket
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.worker import Worker
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.record import JobRecord

# How a job ended, and its output if it has one. Called when what follows has begun, sometimes by the dispatcher: it
# must be quick.
OnEnd = Callable[[JobRecord, Any], None]


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
        on_end: told of every job that began.
        closed_loop: a job comes whenever the one before has ended, whatever the period.
        queued: jobs come when somebody offers their inputs.
        jitter: of releases, or what a burst amounts to, microseconds.
        asked_for: model, weights and input, as they were described.
        last: number of its last job, counted from 1; None if they go on.
        released: jobs so far.
        ended: no more will come.
        next_release: of its next job. By the clock, never by the job before: nothing drifts.
        bucket: holds those who offer inputs to the contract.
    """

    facts: TaskFacts
    model: TaskModel
    source: Source
    offset: int = 0
    burst: int = 1
    overrun: str = "finish"
    on_end: OnEnd | None = None
    closed_loop: bool = False
    queued: bool = False
    jitter: int = 0
    asked_for: tuple[Any, ...] = ()
    last: int | None = None
    released: int = 0
    ended: bool = False
    worker: Worker | None = None
    next_release: int = field(init=False)
    bucket: Bucket = field(init=False)
    _begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.next_release = self.offset
        self.bucket = Bucket(self.facts.period, self.jitter)

    @property
    def budget(self) -> int:
        """Of one job's segments together."""
        loads = [*self.facts.loads[1:], 0]
        return self.facts.loads[0] + sum(max(c, load) for c, load in zip(self.facts.computes, loads, strict=True))

    def begin(self, now: int, before: Running | None = None) -> None:
        """Begin in the middle of a run, or go on: with the numbers, releases and thread of who had the name before."""
        late = now - self.next_release
        if before is not None and not before.closed_loop and not self.closed_loop:
            self.next_release = max(before.next_release - before.facts.period + self.facts.period, now)
            self.bucket.go_on_from(before.bucket)
        elif not self._begun:
            self.next_release = now + self.offset
        elif late > 0:
            self.next_release += -(-late // self.facts.period) * self.facts.period
        self._begun = True
        if before is None:
            return
        if self.last is not None:
            self.last += before.released
        self.released = before.released
        if before.model is self.model:
            self.worker = before.worker
        elif before.worker is not None:
            before.worker.stop()
        before.worker = None
        before._begun = True
        if self.source is before.source and not before.closed_loop:
            self.ended = before.ended


@dataclass(eq=False, slots=True)
class Underway:
    """What the executor knows of a job beside what policies see.

    Attributes:
        told: its record.
        inputs: of its pass.
        then: told how it ended.
        spent: microseconds computed.
        ticket: by which whoever offered it knows it.
        expires: from when on its client has no use for the answer; None if it says nothing of that.
        withdrawn: its client has gone.
    """

    told: JobRecord
    inputs: tuple[Any, ...]
    then: OnEnd | None = None
    spent: int = 0
    ticket: int | None = None
    expires: int | None = None
    withdrawn: bool = False


class Endings:
    """Jobs that have ended, whose owners are still to be told; any thread may add, and tell."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[OnEnd, JobRecord, Any]] = deque()

    def add(self, then: OnEnd, told: JobRecord, output: Any) -> None:
        """One more."""
        self._waiting.append((then, told, output))

    def tell(self) -> None:
        """All there are."""
        while True:
            try:
                then, told, output = self._waiting.popleft()
            except IndexError:
                return
            then(told, output)
            del output
