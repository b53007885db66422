"""Fixed priorities: response times (PROSA's limited-preemptive analysis), and the largest segments allowed.

Every job of the busy interval is looked at, not only the first: the flaw of the 1994 analysis of CAN (Davis, Burns,
Bril, Lukkien, Real-Time Systems 35, 2007).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from narrowboat.tasks.analysis.busy import busy_interval
from narrowboat.tasks.analysis.model import Supply, Task, Times, others, promised
from narrowboat.tasks.analysis.solution import Response, worst_offset


def response(tasks: Sequence[Task], task: Task, supply: Supply = Supply()) -> Response:  # noqa: B008
    """Worst time from a job's arrival to its end. Tasks of one priority may all delay each other.

    Args:
        tasks: all of the processor, this one included.
        task: under analysis.
        supply: of the processor.
    """
    rest = [other for other in promised(list(others(tasks, task))) if other.priority >= task.priority]
    lower = [other for other in tasks if other.background or other.priority < task.priority]
    longest = max(lower, key=lambda other: other.longest, default=None)
    blocked = longest.longest - 1 if longest is not None else 0
    length = busy_interval([task, *rest], supply, blocked)
    if length is None:
        return Response(task.name, None)
    offsets = task.arrival.offsets(length)

    def interference(ends: Times) -> Times:
        work = np.zeros_like(ends)
        for other in rest:
            work += other.request(ends)
        return work

    found = worst_offset(task, offsets, np.full_like(offsets, blocked), interference, supply)
    if found is None:
        return Response(task.name, None)
    bound, offset = found
    window = offset + bound - task.last + 1
    work = {other.name: other.arrival.eta(window) * other.cost for other in rest}
    return Response(task.name, bound, offset, blocked, longest.name if longest and blocked else "", work)


def tolerance(tasks: Sequence[Task], task: Task) -> int:
    """Blocking the task can bear when it is preemptive: ``max over t of t - requests(t) - cost``.

    (Yao, Buttazzo, Bertogna, RTCSA 2009.) Points are the deadline and the arrivals of more important tasks before it.
    """
    higher = [other for other in promised(list(others(tasks, task))) if other.priority >= task.priority]
    points = np.unique(
        np.concatenate([[task.deadline], *(other.arrival.offsets(task.deadline) for other in higher)])
    ).astype(np.int64)
    points = points[points > 0]
    slack = points - task.cost
    for other in higher:
        slack = slack - other.request(points)
    return int(slack.max())


def largest_segment(tasks: Sequence[Task], task: Task) -> int | None:
    """Longest segment the task may have without making a more important one late; None if nothing limits it."""
    rest = promised(list(others(tasks, task)))
    higher = [other for other in rest if task.background or other.priority > task.priority]
    return 1 + min(tolerance(tasks, other) for other in higher) if higher else None
