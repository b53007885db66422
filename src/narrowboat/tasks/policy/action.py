"""What a policy sees, and what it can tell the engines to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from narrowboat.tasks.job import Job, TaskFacts


class Engine(Enum):
    """What works by itself, one thing at a time."""

    LOAD = "load"
    COMPUTE = "compute"


class Do(Enum):
    """What an engine can be told."""

    LOAD = "load"  # one block of a job
    PREFETCH = "prefetch"  # the first block of a task, whose job may not have come yet; can be given up
    ADOPT = "adopt"  # the prefetch under way is this job's first segment from now on
    ABORT = "abort"  # give the prefetch under way up, at the end of its chunk
    COMPUTE = "compute"  # one block of a job
    RUN = "run"  # all blocks of a job, without a boundary
    SWAP_OUT = "swap_out"  # some bytes of a task
    SWAP_IN = "swap_in"  # the bytes of a task that are out

    @property
    def engine(self) -> Engine:
        """Who does it."""
        return Engine.COMPUTE if self in (Do.COMPUTE, Do.RUN) else Engine.LOAD


@dataclass(frozen=True)
class Action:
    """One thing for one engine.

    Attributes:
        do: what.
        task: whose weights.
        job: for which job; None if for none yet.
        block: which; 0 where it means nothing.
        nbytes: that swapping by volume moves.
    """

    do: Do
    task: TaskFacts
    job: Job | None = None
    block: int = 0
    nbytes: int = 0


@dataclass
class View:
    """What a policy sees.

    Attributes:
        now: time.
        pending: jobs released and not finished, in the order of release.
        doing: what each engine is at.
        free_bytes: of the budget, held by nobody; None where nobody counts.
        prefetched: the task whose first block lies in memory without a job; None if none does.
        upcoming: the task whose next release comes first, as far as that can be foreseen.
    """

    now: int
    pending: list[Job] = field(default_factory=list)
    doing: dict[Engine, Action] = field(default_factory=dict)
    free_bytes: int | None = None
    prefetched: TaskFacts | None = None
    upcoming: TaskFacts | None = None


def held_bytes(view: View) -> int:
    """Bytes of blocks and activations that jobs hold now, and what is being loaded or was loaded ahead."""
    held = 0
    for job in view.pending:
        if job.started is not None:
            held += job.task.activation_bytes + sum(job.task.nbytes[job.computed : job.loaded])
    loading = view.doing.get(Engine.LOAD)
    if loading is not None and loading.do in (Do.LOAD, Do.PREFETCH):
        held += loading.task.nbytes[loading.block]
    if view.prefetched is not None:
        held += view.prefetched.nbytes[0]
    return held


class Policy(Protocol):
    """Asked at every event; never sees how long things will really take."""

    def choose(self, view: View) -> Sequence[Action]:
        """What to start now; nothing to wait for the next event."""

    def ended(self, action: Action, now: int) -> None:
        """An action is over."""

    def failed(self, action: Action) -> None:
        """An action came to nothing: what it was to bring in is as much out as before."""
