"""Which jobs are of no use to anybody any more: they are dropped, and never run late."""

from __future__ import annotations

from collections.abc import Mapping

from narrowboat.tasks.execute.running import Underway
from narrowboat.tasks.job import Job
from narrowboat.tasks.policy.action import Engine, View
from narrowboat.tasks.record import EXPIRED, UNWANTED, WITHDRAWN


def hopeless(view: View, under: Mapping[Job, Underway], now: int) -> list[tuple[Job, str]]:
    """Jobs to be dropped now, and why.

    A job that has not begun by its deadline would only make others late. One that its client does not wait for ends at
    the next boundary, also if it has begun: never in the middle of a block.
    """
    computing = view.doing.get(Engine.COMPUTE)
    found = []
    for job in view.pending:
        about = under[job]
        if job.started is None and now >= job.due:
            found.append((job, EXPIRED))
        elif computing is not None and computing.job is job:
            continue
        elif about.withdrawn:
            found.append((job, WITHDRAWN))
        elif about.expires is not None and now >= about.expires:
            found.append((job, UNWANTED))
    return found
