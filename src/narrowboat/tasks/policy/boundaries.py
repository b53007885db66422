"""Compute one block while the next is loaded; decide anew when both have ended.

A preempted job keeps the block it has loaded ("LP-keep"), so that the two engines together are one processor, and jobs
are chains of segments that are not preempted (``analysis.pipeline``). Whole models are one block.
"""

from __future__ import annotations

from collections.abc import Sequence

from narrowboat.tasks.job import Job
from narrowboat.tasks.policy.action import Action, Do, Engine, View
from narrowboat.tasks.policy.order import Order, first


class BlockBoundaries:
    """Segments of the job that goes first.

    Args:
        order: of the jobs.
        preempt: at block boundaries; otherwise a job that has begun goes on to its end.
        prefetch: load the first block of the job that is likely next while the loader has nothing else to do. It is
            given up, within a chunk, when another comes first.
    """

    def __init__(self, order: Order, *, preempt: bool = True, prefetch: bool = False) -> None:
        self.order, self.preempt, self.prefetch = order, preempt, prefetch

    def pick(self, pending: Sequence[Job]) -> Job | None:
        """Whose segment is next."""
        if not self.preempt:
            begun = next((job for job in pending if job.started is not None), None)
            if begun is not None:
                return begun
        return first(pending, self.order)

    def choose(self, view: View) -> Sequence[Action]:
        """At a boundary the next segment; between boundaries nothing, but for giving a prefetch up."""
        if Engine.COMPUTE in view.doing:
            return ()
        loading = view.doing.get(Engine.LOAD)
        job = self.pick(view.pending)
        if loading is None:
            return self._segment(view, job) if job is not None else self._ahead(view, None)
        if loading.do is not Do.PREFETCH or job is None:
            return ()
        # Once a job waits for it, the prefetch is its first segment, and is not given up for others: what has been
        # loaded while it waited would be lost time that no analysis knows of.
        mine = job.untouched and loading.task is job.task
        return (Action(Do.ADOPT if mine else Do.ABORT, loading.task, job if mine else None),)

    def ended(self, action: Action, now: int) -> None:
        """Nothing to remember: jobs know how far they are."""

    def failed(self, action: Action) -> None:
        """The same."""

    def _segment(self, view: View, job: Job) -> Sequence[Action]:
        task, block = job.task, job.computed
        there = job.loaded > block or not task.loads[block] or (job.untouched and view.prefetched is task)
        following = block + 1 if there else block
        actions = [Action(Do.COMPUTE, task, job, block)] if there else []
        if following >= task.blocks:
            return (*actions, *self._ahead(view, job))
        if task.loads[following]:
            actions.append(Action(Do.LOAD, task, job, following))
        return actions

    def _ahead(self, view: View, running: Job | None) -> Sequence[Action]:
        """The loader is free: the first block of whoever is likely next."""
        if not self.prefetch or view.prefetched is not None:
            return ()
        waiting = min((job for job in view.pending if job is not running), key=self.order, default=None)
        if waiting is not None and not waiting.untouched:
            return ()  # it has its block
        task = waiting.task if waiting is not None else view.upcoming
        if task is None or not task.loads[0]:
            return ()
        if view.free_bytes is not None and view.free_bytes - _about_to_take(running) < task.nbytes[0]:
            return ()
        return (Action(Do.PREFETCH, task),)


def _about_to_take(running: Job | None) -> int:
    """Bytes that the segment which begins now takes and nobody has counted yet."""
    if running is None:
        return 0
    fresh = running.task.nbytes[running.computed] if running.loaded <= running.computed else 0
    return fresh + (running.task.activation_bytes if running.started is None else 0)
