"""RT-Swap's rules: whole jobs in EDF order on one processor, bytes swapped by volume beside them.

After the public scheduler of Kang et al. (RTAS 2024): jobs are not preempted; one swap is under way at a time; the
victim is the task scheduled last that has something left to swap; only what is needed goes out, in chunks; a task
whose swap-in has just ended runs next, whoever else waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from narrowboat.tasks.job import Job, TaskFacts
from narrowboat.tasks.policy.action import Action, Do, Engine, View
from narrowboat.tasks.policy.order import edf


class VolumeSwap:
    """Swapping by volume.

    Args:
        tasks: all of them; ``swap_bytes`` of each can be out of memory, and is at the start.
        free_bytes: of the budget that the tasks' other bytes leave.
        chunk: bytes by which swapping goes.
    """

    def __init__(self, tasks: Sequence[TaskFacts], free_bytes: int, chunk: int = 1) -> None:
        self.out = {task.name: task.swap_bytes for task in tasks}
        self.free, self.chunk = free_bytes, chunk
        self._tasks = list(tasks)
        self._scheduled: dict[str, int] = {}
        self._forced: Job | None = None
        self._for: Job | None = None

    def choose(self, view: View) -> Sequence[Action]:
        """What the scheduler does at this event."""
        running = view.doing.get(Engine.COMPUTE)
        swapping = Engine.LOAD in view.doing
        if running is not None:
            head = self._head([job for job in view.pending if job is not running.job and self.out[job.task.name]])
            return () if swapping or head is None else self._bring(view, head, running.task)
        if self._forced is not None and self._forced in view.pending:
            return self._run(self._forced, view.now)
        head = self._head(view.pending)
        if head is None:
            return ()
        if self.out[head.task.name]:
            return () if swapping else self._bring(view, head, None)
        return self._run(head, view.now)

    def ended(self, action: Action, now: int) -> None:
        """Count what has moved."""
        if action.do is Do.SWAP_OUT:
            self.out[action.task.name] += action.nbytes
            self.free += action.nbytes
        elif action.do is Do.SWAP_IN:
            self.out[action.task.name] = 0
            self._forced = action.job

    def failed(self, action: Action) -> None:
        """What a swap-in was given is free again."""
        if action.do is Do.SWAP_IN:
            self.free += self.out[action.task.name]

    @staticmethod
    def _head(jobs: Sequence[Job]) -> Job | None:
        return min(jobs, key=edf, default=None)

    def _run(self, job: Job, now: int) -> Sequence[Action]:
        self._forced = None
        self._scheduled[job.task.name] = now
        return (Action(Do.RUN, job.task, job),)

    def _bring(self, view: View, job: Job, running: TaskFacts | None) -> Sequence[Action]:
        """A step towards having the job's bytes in memory."""
        needed = self.out[job.task.name] - self.free
        if needed <= 0:
            self.free -= self.out[job.task.name]
            return (Action(Do.SWAP_IN, job.task, job, nbytes=self.out[job.task.name]),)
        forced = self._forced.task if self._forced is not None else None
        victims = [
            task
            for task in self._tasks
            if task not in (job.task, running, forced) and self.out[task.name] < task.swap_bytes
        ]
        if not victims:
            return ()
        victim = max(victims, key=lambda task: self._scheduled.get(task.name, -1))
        rounded = -(-needed // self.chunk) * self.chunk
        return (Action(Do.SWAP_OUT, victim, nbytes=min(rounded, victim.swap_bytes - self.out[victim.name])),)
