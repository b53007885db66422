"""The words of the analysis: blocks, arrivals, supply, tasks. Times are integers, in whatever unit the caller counts.

The smallest time is one unit, the papers' epsilon. The run-time counts microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Consecutive layers that swap together.

    Attributes:
        load: time to read its weights, measured with compute busy; 0 for a pinned block.
        compute: time to run it, measured with loads busy.
        nbytes: of its weights that are swapped; 0 for a pinned block.
    """

    load: int
    compute: int
    nbytes: int = 0

    def __post_init__(self) -> None:
        if self.load < 0 or self.nbytes < 0:
            raise ValueError("a block's load and bytes cannot be negative")
        if self.compute < 0 or self.load + self.compute == 0:
            raise ValueError("a block takes some time")


@dataclass(frozen=True)
class Arrival:
    """When jobs may arrive: at most ``eta(d)`` of them in any interval of length ``d``.

    Attributes:
        period: least time between two arrivals without jitter.
        jitter: by how much an arrival may be late, so that the next one comes sooner.
    """

    period: int
    jitter: int = 0

    def __post_init__(self) -> None:
        if self.period <= 0:
            raise ValueError("a period must be positive")
        if self.jitter < 0:
            raise ValueError("a jitter cannot be negative")

    @classmethod
    def token_bucket(cls, burst: int, period: int) -> Arrival:
        """At most ``burst`` jobs at once, one more per period: the same curve as that much jitter."""
        if burst < 1:
            raise ValueError("a token bucket holds at least one token")
        return cls(period, (burst - 1) * period)

    @property
    def burst(self) -> int:
        """Jobs that may arrive at one instant."""
        return 1 + self.jitter // self.period

    def eta(self, length: int) -> int:
        """Most arrivals in a half-open interval of that length."""
        return -(-(length + self.jitter) // self.period) if length > 0 else 0

    def etas(self, lengths: Times) -> Times:
        """The same for many lengths."""
        counts = -(-(lengths + self.jitter) // self.period)
        return np.where(lengths > 0, counts, 0)

    def offsets(self, before: int) -> Times:
        """The offsets below ``before`` at which the worst case has arrivals, in order, each once."""
        first = self.period - self.jitter % self.period
        later = np.arange(first, max(before, first), self.period, dtype=np.int64)
        return np.concatenate(([0], later[later < before])) if before > 0 else later[:0]


@dataclass(frozen=True)
class Supply:
    """What the processor gives in any interval of length ``d``: at least ``share * (d - delay)``.

    A reservation of Q in every P is ``Supply(Q / P, 2 * (P - Q))`` (Shin and Lee, RTSS 2003).

    Attributes:
        share: of the processor, over 0 and at most 1.
        delay: longest time without any.
    """

    share: Fraction = Fraction(1)
    delay: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError("a share of the processor lies over 0 and is at most 1")
        if self.delay < 0:
            raise ValueError("a delay cannot be negative")

    @classmethod
    def of(cls, share: float | Fraction, delay: int = 0) -> Supply:
        """The share as a fraction of small terms, never over what was said."""
        exact = Fraction(share).limit_denominator(10_000)
        return cls(exact if exact <= share or float(exact) == share else exact - Fraction(1, 10_000), delay)

    @property
    def ideal(self) -> bool:
        """Whether the processor is wholly ours."""
        return self.share == 1 and self.delay == 0

    def bound(self, length: int) -> int:
        """Least work done in an interval of that length."""
        return max(0, (length - self.delay) * self.share.numerator // self.share.denominator)

    def bounds(self, lengths: Times) -> Times:
        """The same for many lengths."""
        return np.maximum(0, (lengths - self.delay) * self.share.numerator // self.share.denominator)

    def time_for(self, work: int) -> int:
        """Length of the shortest interval in which that work is surely done."""
        return self.delay - (-work * self.share.denominator // self.share.numerator) if work > 0 else 0

    def times_for(self, work: Times) -> Times:
        """The same for many amounts."""
        times = self.delay - (-work * self.share.denominator // self.share.numerator)
        return np.where(work > 0, times, 0)

    def less(self, work: int) -> Supply:
        """The supply that is left when ``work`` of it may go elsewhere, at the worst instant."""
        return replace(self, delay=self.delay - (-work * self.share.denominator // self.share.numerator))


@dataclass(frozen=True)
class Task:
    """A task as the analysis sees it: chains of segments that arrive by a contract and have a deadline.

    Attributes:
        name: of which there is one in a set. (Two cameras may have the same parameters.)
        segments: worst lengths of the parts that are not preempted, in order; their sum is the job's cost.
        arrival: the contract.
        deadline: relative to the arrival.
        priority: larger is more important; counts under fixed priorities only.
        preemptive: the segments may be preempted anywhere after all.
        background: it runs when nobody else has a job, so that all it can do to others is block them.
    """

    name: str
    segments: tuple[int, ...]
    arrival: Arrival
    deadline: int
    priority: int = 0
    preemptive: bool = False
    background: bool = False

    def __post_init__(self) -> None:
        if not self.segments or min(self.segments) < 0 or sum(self.segments) <= 0:
            raise ValueError(f"task {self.name!r}: a job takes some time, and no segment a negative one")
        if self.deadline <= 0:
            raise ValueError(f"task {self.name!r}: a deadline must be positive")

    @property
    def cost(self) -> int:
        """Worst time of one job, alone."""
        return sum(self.segments)

    @property
    def longest(self) -> int:
        """Longest time that a job is not preempted."""
        return 1 if self.preemptive else max(self.segments)

    @property
    def last(self) -> int:
        """The part at the end that is not preempted. Empty segments at the end are no segments."""
        return 1 if self.preemptive else next(length for length in reversed(self.segments) if length)

    @property
    def utilisation(self) -> Fraction:
        """Of the processor, in the long run."""
        return Fraction(self.cost, self.arrival.period)

    def whole(self) -> Task:
        """The same without preemption."""
        return replace(self, segments=(self.cost,), preemptive=False)

    def request(self, lengths: Times) -> Times:
        """Most work that arrives in intervals of these lengths (the request bound function)."""
        return self.arrival.etas(lengths) * self.cost

    def demand(self, lengths: Times) -> Times:
        """Most work that arrives and is due within intervals of these lengths (the demand bound function)."""
        return self.arrival.etas(lengths - self.deadline + 1) * self.cost


def check_names(tasks: Sequence[Task]) -> None:
    """Refuse a set in which two tasks share a name.

    Raises:
        ValueError: they do.
    """
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ValueError(f"two tasks are named {task.name!r}")
        seen.add(task.name)


def others(tasks: Sequence[Task], task: Task) -> Iterator[Task]:
    """Everyone but this one; by name, as twins are two tasks."""
    return (other for other in tasks if other.name != task.name)


def promised(tasks: Sequence[Task]) -> list[Task]:
    """Those that are not in the background."""
    return [task for task in tasks if not task.background]


def background_segment(tasks: Sequence[Task]) -> int:
    """What a job in the background still has to do at most when another comes, of the segment it has begun."""
    return max((task.longest - 1 for task in tasks if task.background), default=0)


def total_utilisation(tasks: Sequence[Task]) -> Fraction:
    """Of all tasks together."""
    return sum((task.utilisation for task in tasks), Fraction(0))
