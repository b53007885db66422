"""A job while it runs, as policies see it: what is due when, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from narrowboat.tasks.analysis.model import Block


@dataclass(frozen=True)
class TaskFacts:
    """What a policy knows of a task before it runs.

    Attributes:
        name: of the task.
        index: its place in the set; breaks ties.
        loads: worst time to load each block; 0 for one that is resident.
        computes: worst time to run each block.
        nbytes: swapped bytes of each block.
        deadline: relative.
        period: between arrivals.
        priority: larger is more important; fixed priorities only.
        guaranteed: whether its deadlines are promised; the others never go before one that is.
        activation_bytes: of one job.
        swap_bytes: most of its weights that may be out of memory, under policies that swap by volume.
    """

    name: str
    index: int
    loads: tuple[int, ...]
    computes: tuple[int, ...]
    nbytes: tuple[int, ...]
    deadline: int
    period: int
    priority: int = 0
    guaranteed: bool = True
    activation_bytes: int = 0
    swap_bytes: int = 0

    @classmethod
    def of_blocks(
        cls, name: str, index: int, blocks: Sequence[Block], deadline: int, period: int, **more: Any
    ) -> TaskFacts:
        """Of a task that is cut so; ``more`` are the other attributes."""
        loads, computes, nbytes = zip(*((block.load, block.compute, block.nbytes) for block in blocks), strict=True)
        return cls(name, index, loads, computes, nbytes, deadline, period, **more)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return len(self.computes)


@dataclass(eq=False)
class Job:
    """One arrival of a task.

    Attributes:
        task: of which it is one.
        number: counted from 0 within the task.
        release: when it arrived.
        loaded: blocks loaded so far, in order.
        computed: blocks computed so far, in order.
        started: when its first segment began; None if it has not.
        degraded: it is over its budget and goes on as best effort.
        rank: among jobs that are promised nothing, smaller first.
    """

    task: TaskFacts
    number: int
    release: int
    loaded: int = 0
    computed: int = 0
    started: int | None = None
    degraded: bool = False
    rank: int = 0

    @property
    def promised(self) -> bool:
        """Whether it goes before all that is best effort."""
        return self.task.guaranteed and not self.degraded

    @property
    def standing(self) -> tuple[bool, int]:
        """What comes before a policy's own order: best effort after all that is promised, and by rank."""
        return (False, 0) if self.promised else (True, self.rank)

    @property
    def due(self) -> int:
        """Its absolute deadline."""
        return self.release + self.task.deadline

    @property
    def finished(self) -> bool:
        """Whether every block has been computed."""
        return self.computed == self.task.blocks

    @property
    def untouched(self) -> bool:
        """Whether nothing of it has been loaded or computed."""
        return self.loaded == 0 and self.computed == 0
