"""Which jobs come: by the clock from a task's source, or when somebody offers inputs; and which are not let in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from narrowboat.errors import NarrowboatError
from narrowboat.tasks.execute.account import Account
from narrowboat.tasks.execute.inputs import InputsEndedError
from narrowboat.tasks.execute.running import OnEnd, Running, Underway
from narrowboat.tasks.job import Job
from narrowboat.tasks.record import JobRecord, beyond


@dataclass(frozen=True)
class Wish:
    """What a client asks beside the answer.

    Attributes:
        ticket: by which it may withdraw.
        patience: microseconds after which the answer is of no use; None for the task's deadline only.
        rank: among jobs that are promised nothing, smaller first.
    """

    ticket: int | None = None
    patience: int | None = None
    rank: int = 0


NO_WISH = Wish()


class Arrivals:
    """The door. Used under the executor's lock.

    Args:
        tasks: that there are.
        pending: jobs that have come and not ended; new ones are added.
        under: what is known of them beside.
        account: is told of every job, let in or not.

    Attributes:
        by_name: the tasks.
        holding: the tasks are about to change: nothing comes for those that are promised nothing.
    """

    def __init__(
        self, tasks: Sequence[Running], pending: list[Job], under: dict[Job, Underway], account: Account
    ) -> None:
        self._pending, self._under, self._account = pending, under, account
        self.holding = False
        self.by_name: dict[str, Running] = {}
        self.replace(tasks)

    def replace(self, tasks: Sequence[Running]) -> None:
        """Other tasks."""
        self.by_name = {task.facts.name: task for task in tasks}

    @property
    def open(self) -> bool:
        """Whether somebody may still offer inputs."""
        return any(task.queued and not task.ended for task in self.by_name.values())

    def upcoming(self, until: int | None, jobs: int | None) -> Running | None:
        """The task whose next job comes first by the clock; None if none will."""
        coming = [
            task
            for task in self.by_name.values()
            if not task.ended
            and not task.queued
            and (jobs is None or task.released < jobs)
            and (until is None or task.closed_loop or task.next_release < until)
        ]
        return min(coming, key=lambda task: task.next_release, default=None)

    def release(self, now: int, until: int | None, jobs: int | None) -> None:
        """All jobs whose time has come.

        Args:
            now: time of the run.
            until: when releases end.
            jobs: of each task at most.
        """
        for task in self.by_name.values():
            while not task.ended and not task.queued and self._due(task, now):
                if jobs is not None and task.released >= jobs:
                    break
                if not task.closed_loop and until is not None and task.next_release >= until:
                    break
                self._arrive(task, now if task.closed_loop else task.next_release, now)

    def _due(self, task: Running, now: int) -> bool:
        if task.closed_loop:
            return not self.holding and all(job.task is not task.facts for job in self._pending)
        return task.next_release <= now

    def _arrive(self, task: Running, when: int, now: int) -> None:
        """A job of a task whose inputs come from its source."""
        job, told = _job(task, when)
        task.next_release = when + task.facts.period
        refused = self._refused(task)
        if not refused:
            try:
                inputs = task.source.take()
            except InputsEndedError:
                task.ended = True
                return
            except NarrowboatError as error:
                refused, inputs = str(error), None
                task.ended = True
            if inputs is not None:
                self._let_in(job, Underway(told, inputs, task.on_end))
                task.ended = task.ended or task.released == task.last
            elif not refused:
                refused = "no input has come"
        self._account.released(told, now)
        if refused:
            self._account.ended(told, now, "skipped", refused)

    def offer(self, name: str, inputs: tuple[Any, ...], then: OnEnd, now: int, wish: Wish) -> bool:
        """An input has come; True if it was let in. See ``Executor.offer``."""
        task = self.by_name.get(name)
        if task is None or not task.queued or task.ended:
            cause = f"no task {name!r} takes inputs now"
            then(JobRecord(name, 0, now, now, outcome="skipped", cause=cause), None)
            return False
        wait = task.bucket.wait(now)
        job, told = _job(task, now)
        job.rank, told.rank, told.wait = wish.rank, wish.rank, wait
        self._account.released(told, now)
        refused = beyond(wait) if wait else self._refused(task)
        if refused:
            self._account.ended(told, now, "skipped", refused)
            then(told, None)
            return False
        task.bucket.take(now)
        expires = None if wish.patience is None else now + wish.patience
        self._let_in(job, Underway(told, inputs, then, ticket=wish.ticket, expires=expires))
        return True

    def _let_in(self, job: Job, under: Underway) -> None:
        self._under[job] = under
        self._pending.append(job)

    def _refused(self, task: Running) -> str:
        """Why no job of the task may come now; empty if it may."""
        if self.holding and not task.facts.guaranteed:
            return "the tasks are about to change"
        if sum(other.task is task.facts for other in self._pending) >= task.burst:
            return "the job before is still under way"
        return ""


def _job(task: Running, when: int) -> tuple[Job, JobRecord]:
    number = task.released
    task.released += 1
    job = Job(task.facts, number, when)
    return job, JobRecord(task.facts.name, number, when, job.due)
