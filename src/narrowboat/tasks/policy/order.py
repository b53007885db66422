"""Which job goes first."""

from __future__ import annotations

from collections.abc import Callable

from narrowboat.tasks.job import Job

Order = Callable[[Job], tuple[int, ...]]


def edf(job: Job) -> tuple[int, ...]:
    """Earliest absolute deadline first; ties by the tasks' places. Best effort after all that is guaranteed."""
    return (*job.standing, job.due, job.task.index, job.number)


def fp(job: Job) -> tuple[int, ...]:
    """The most important first; equals in the order of release."""
    return (*job.standing, -job.task.priority, job.release, job.task.index, job.number)


ORDERS: dict[str, Order] = {"edf": edf, "fp": fp}
