"""Which job goes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from narrowboat.tasks.job import Job

Order = Callable[[Job], tuple[int, ...]]


def edf(job: Job) -> tuple[int, ...]:
    """Earliest absolute deadline first; ties by the tasks' places. Best effort after all that is guaranteed."""
    return (*job.standing, job.due, job.task.index, job.number)


def fp(job: Job) -> tuple[int, ...]:
    """The most important first; equals in the order of release."""
    return (*job.standing, -job.task.priority, job.release, job.task.index, job.number)


def first(jobs: Sequence[Job], order: Order) -> Job | None:
    """Who goes first. A task's jobs run one after the other: for one that has begun, the next of its kind waits."""
    best = min(jobs, key=order, default=None)
    if best is None or best.started is not None:
        return best
    return next((job for job in jobs if job.task is best.task and job.started is not None), best)


ORDERS: dict[str, Order] = {"edf": edf, "fp": fp}
