"""Earliest deadline first: response times, and the demand test that says where and why a set fails.

Response times follow PROSA's machine-checked analysis of limited-preemptive EDF (rt-proofs, ``results.rta.edf``); a
task with one segment is not preemptive at all. The demand test is George, Rivierre and Spuri's (INRIA RR-2966, 1996),
with the longest segment in place of the whole cost (Baruah, ECRTS 2005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from narrowboat.tasks.analysis.busy import busy_interval
from narrowboat.tasks.analysis.model import Supply, Task, Times, background_segment, others, promised
from narrowboat.tasks.analysis.solution import Response, worst_offset


@dataclass(frozen=True)
class Violation:
    """An interval in which more is due than can be served.

    Attributes:
        instant: its length.
        demand: work that arrives and is due within it.
        blocking: work of a job with a later deadline that cannot be preempted in time.
        blocker: whose; empty if nobody's.
        supply: least work served in it.
    """

    instant: int
    demand: int
    blocking: int
    blocker: str
    supply: int


def _blocker(tasks: Sequence[Task], deadline: int) -> tuple[int, str]:
    """The longest segment, less one unit, of a task with a later deadline; and whose it is."""
    later = (task for task in tasks if task.background or task.deadline > deadline)
    longest = max(later, key=lambda task: task.longest, default=None)
    return (longest.longest - 1, longest.name) if longest is not None and longest.longest > 1 else (0, "")


def _blocking(tasks: Sequence[Task], deadlines: Times) -> Times:
    """The same for many deadlines, by a step function over the tasks' own."""
    ordered = sorted(promised(tasks), key=lambda task: task.deadline)
    # Longest among those from here on; only the background's after the last.
    tails = np.full(len(ordered) + 1, background_segment(tasks), dtype=np.int64)
    for place in range(len(ordered) - 1, -1, -1):
        tails[place] = max(int(tails[place + 1]), ordered[place].longest - 1)
    steps = np.array([task.deadline for task in ordered], dtype=np.int64)
    return tails[np.searchsorted(steps, deadlines, side="right")]


def _interval(tasks: Sequence[Task], task: Task, supply: Supply) -> int | None:
    """Bound on the busy interval of any job of the task."""
    begun_before = background_segment(tasks)
    tasks = promised(tasks)
    arrivals = busy_interval(tasks, supply)
    if arrivals is None or supply.ideal:
        return arrivals
    with_background = busy_interval(tasks, supply, begun_before)
    if with_background is None:
        return None
    # With a processor that is not always there, an interval may begin with a segment of a later deadline.
    begun = [
        other.longest
        - 1
        + sum(
            earlier.arrival.eta(other.deadline - earlier.deadline) * earlier.cost
            for earlier in tasks
            if earlier.deadline <= other.deadline
        )
        for other in tasks
        if other.deadline > task.deadline
    ]
    return max([with_background, *begun])


def response(tasks: Sequence[Task], task: Task, supply: Supply = Supply()) -> Response:  # noqa: B008
    """Worst time from a job's arrival to its end.

    Args:
        tasks: all of the processor, this one included.
        task: under analysis.
        supply: of the processor.
    """
    length = _interval(tasks, task, supply)
    if length is None:
        return Response(task.name, None)
    everybody = list(others(tasks, task))
    rest = promised(everybody)
    points = [task.arrival.offsets(length)]
    for other in rest:
        shift = other.deadline - task.deadline
        points.append(other.arrival.offsets(max(length - shift, 0)) + shift)
        if not supply.ideal:
            points.append(np.array([shift], dtype=np.int64))
    offsets = np.unique(np.concatenate(points))
    offsets = offsets[(offsets >= 0) & (offsets < length)]
    blocking = _blocking(everybody, offsets + task.deadline)

    def interference(ends: Times) -> Times:
        work = np.zeros_like(ends)
        for other in rest:
            work += other.request(np.minimum(ends, offsets + 1 + task.deadline - other.deadline))
        return work

    found = worst_offset(task, offsets, blocking, interference, supply)
    if found is None:
        return Response(task.name, None)
    bound, offset = found
    blocked, blocker = _blocker(everybody, offset + task.deadline)
    window = offset + bound
    work = {
        other.name: other.arrival.eta(min(window, offset + 1 + task.deadline - other.deadline)) * other.cost
        for other in rest
    }
    return Response(task.name, bound, offset, blocked, blocker, {name: part for name, part in work.items() if part})


def _instants(tasks: Sequence[Task], length: int) -> Times:
    """The deadlines in an interval of that length at which demand may step up."""
    points = [task.arrival.offsets(max(length - task.deadline + 1, 0)) + task.deadline for task in tasks]
    return np.unique(np.concatenate(points))


def test_length(tasks: Sequence[Task], supply: Supply) -> int | None:
    """Length up to which deadlines have to be looked at; None if more arrives than is served."""
    background = background_segment(tasks)
    tasks = promised(tasks)
    # Of the others nobody blocks at the last deadline or later: their blocking makes no interval longer than that.
    length = busy_interval(tasks, supply, background)
    return None if length is None else max(length, max(task.deadline for task in tasks))


def violation(tasks: Sequence[Task], supply: Supply = Supply()) -> Violation | None:  # noqa: B008
    """The first interval that fails ``blocking + demand <= supply``; None where every deadline is met.

    Raises:
        OverflowError: more work arrives than is served in the long run, so that no single interval shows it.
    """
    if not promised(tasks):
        return None
    length = test_length(tasks, supply)
    if length is None:
        raise OverflowError("more work arrives than the processor serves")
    instants = _instants(promised(tasks), length)
    demand = np.zeros_like(instants)
    for task in promised(tasks):
        demand += task.demand(instants)
    blocking = _blocking(tasks, instants)
    supplied = supply.bounds(instants)
    failing = np.nonzero(demand + blocking > supplied)[0]
    if not len(failing):
        return None
    first = int(failing[0])
    instant = int(instants[first])
    blocked, blocker = _blocker(tasks, instant)
    return Violation(instant, int(demand[first]), blocked, blocker, int(supplied[first]))


def largest_segment(tasks: Sequence[Task], task: Task, supply: Supply = Supply()) -> int | None:  # noqa: B008
    """Longest segment the task may have without making a task of a shorter deadline late (Baruah, ECRTS 2005).

    ``q <= 1 + min over t < D of (supply(t) - demand(t))``; None if nothing limits it. Below 1 the others fail alone.
    """
    if task.background:
        rest, end = promised(tasks), test_length(tasks, supply)
    else:
        rest = [other for other in promised(list(others(tasks, task))) if other.deadline < task.deadline]
        end = task.deadline - 1  # of the task itself nothing is due before
    if not rest or end is None:
        return None
    instants = _instants(rest, end)
    if not len(instants):
        return None
    demand = np.zeros_like(instants)
    for other in rest:
        demand += other.demand(instants)
    return 1 + int((supply.bounds(instants) - demand).min())
