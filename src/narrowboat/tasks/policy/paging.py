"""Demand paging, as memory-mapped weights do: a block is loaded when it is needed; the least recently used go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from narrowboat.tasks.job import Job
from narrowboat.tasks.policy.action import Action, Do, View
from narrowboat.tasks.policy.order import edf


class DemandPaging:
    """Whole jobs in EDF order, without preemption; nothing is loaded ahead.

    Args:
        cache_bytes: for weights.
    """

    def __init__(self, cache_bytes: int) -> None:
        self._room = cache_bytes
        self._cached: OrderedDict[tuple[str, int], int] = OrderedDict()

    def choose(self, view: View) -> Sequence[Action]:
        """The next block of the job under way, or its weights."""
        if view.doing or not view.pending:
            return ()
        begun = next((job for job in view.pending if job.started is not None), None)
        job: Job = begun or min(view.pending, key=edf)
        key = (job.task.name, job.computed)
        if job.loaded <= job.computed and key not in self._cached and job.task.loads[job.computed]:
            return (Action(Do.LOAD, job.task, job, job.computed),)
        return (Action(Do.COMPUTE, job.task, job, job.computed),)

    def ended(self, action: Action, now: int) -> None:
        """What was used moves to the end of the queue; what no longer fits leaves at its front."""
        key = (action.task.name, action.block)
        if not action.task.loads[action.block]:
            return
        self._cached[key] = action.task.nbytes[action.block]
        self._cached.move_to_end(key)
        while sum(self._cached.values()) > self._room and len(self._cached) > 1:
            self._cached.popitem(last=False)

    def failed(self, action: Action) -> None:
        """What was not loaded is not in the cache."""
