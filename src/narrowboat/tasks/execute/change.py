"""Other tasks, or another budget, while tasks run: prepared beside them, warmed up as best effort, then promised.

Admission has said yes before any of this begins. A change that fails on its way leaves the tasks as they were.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from narrowboat.errors import ExecutorError, NarrowboatError, StorageError
from narrowboat.tasks.execute.arrangement import Arrangement, Switch
from narrowboat.tasks.execute.asked import arrangement_of, forms_of
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.load_models import Loaded
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.serve_jobs import JobServer
from narrowboat.tasks.record import JobRecord
from narrowboat.tasks.spec.load import tasks_from

if TYPE_CHECKING:
    from narrowboat.tasks.execute.child import Pipe

_WARM = 2  # jobs of a new network before it is promised anything
_PATIENCE = 60_000_000  # microseconds to wait for a moment without work; more for tasks of longer periods
_WARM_SECONDS = 600.0
_TRIES = 100


class Changer:
    """Changes, one at a time.

    Args:
        executor: runs.
        arrangement: in force.
        loaded: the networks.
        jobs: that come from outside.
        pipe: is told how each change went.
    """

    def __init__(
        self, executor: Executor, arrangement: Arrangement, loaded: Loaded, jobs: JobServer, pipe: Pipe
    ) -> None:
        self._executor, self._loaded, self._jobs, self._pipe = executor, loaded, jobs, pipe
        self._now = arrangement
        self._one = threading.Lock()

    def start(self, told: dict[str, Any]) -> None:
        """Begin a change in a thread of its own; inputs go on to be heard.

        Args:
            told: as for ``start.run``, with ``prepare_bytes``, ``allowed_us`` and, where there are new networks,
                ``warm_setup``: what is assumed while those warm up.
        """
        threading.Thread(target=self._run, args=(told,), name="narrowboat-changer", daemon=True).start()

    def _run(self, told: dict[str, Any]) -> None:
        with self._one:
            try:
                self._change(told)
            except NarrowboatError as error:
                self._pipe.tell("refused", number=told["number"], type=type(error).__name__, message=str(error))
            except Exception as error:
                message = f"the change failed: {type(error).__name__}: {error}"
                self._pipe.tell("refused", number=told["number"], type="ExecutorError", message=message)
            else:
                last = self._executor.account.record.changes[-1]
                self._pipe.tell("changed", number=told["number"], begin=last.begin, end=last.end, allowed=last.allowed)

    def _change(self, told: dict[str, Any]) -> None:
        executor, before = self._executor, self._now
        settings = tasks_from(told["settings"])
        try:
            if told["prepare_bytes"]:
                self._make_room(before.pool_bytes - told["prepare_bytes"])
            models = self._loaded.open(settings, told["mirrors"])
            self._loaded.ground.check(settings.budget)
            for model in models.values():
                self._loaded.ground.prepare(model)
            after = arrangement_of(told, models, self._loaded.folder, before)
            self._jobs.forms.update(forms_of(told))  # those that go are asked for until they have gone
            fresh = {task.facts.name for task in after.tasks if task.model not in before.placements}
            if fresh:
                self._warm_up(before, after, fresh, told)
            else:
                self._switch(before, after, told["allowed_us"])
        except BaseException:
            self._loaded.keep_only(before.placements)
            executor.resize_pool(before.pool_bytes)
            raise
        self._now = after
        self._loaded.keep_only(after.placements)

    def _make_room(self, pool_bytes: int) -> None:
        """What a job that runs has loaded ahead may be in the way for a moment."""
        for left in range(_TRIES, -1, -1):
            try:
                self._executor.resize_pool(pool_bytes)
                return
            except StorageError:
                if not left:
                    raise
                time.sleep(0.05)

    def _warm_up(self, before: Arrangement, after: Arrangement, fresh: set[str], told: dict[str, Any]) -> None:
        """Two switches: new networks first run as best effort, which delays nobody by more than a block."""
        ended: queue.SimpleQueue[JobRecord] = queue.SimpleQueue()
        tasks = [_warming(task, ended) if task.facts.name in fresh else task for task in after.tasks]
        middle = Arrangement(
            tasks, after.policy, after.budget, after.pool_bytes, after.placements, told["warm_setup"], after.pool_bytes
        )
        self._switch(before, middle, told["allowed_us"])
        try:
            for _ in range(_WARM * len(fresh)):
                job = ended.get(timeout=_WARM_SECONDS)
                if job.outcome not in ("done", "late"):
                    raise ExecutorError(f"task {job.task!r} fails when it is tried: {job.cause}")
            self._switch(middle, after, told["allowed_us"])
        except queue.Empty:
            self._switch(middle, before, told["allowed_us"])
            raise ExecutorError(f"no job of {', '.join(sorted(fresh))} ended: the others leave no time") from None
        except NarrowboatError:
            self._switch(middle, before, told["allowed_us"])
            raise

    def _switch(self, before: Arrangement, after: Arrangement, allowed: int) -> None:
        said: queue.SimpleQueue[str] = queue.SimpleQueue()
        patience = max(_PATIENCE, 2 * max(task.facts.period for task in before.tasks))
        self._executor.request(Switch(before, after, allowed, said.put, patience))
        failed = said.get()
        if failed:
            raise ExecutorError(failed)


def _warming(task: Running, ended: queue.SimpleQueue[JobRecord]) -> Running:
    inputs = task.model.inputs
    source = Source(lambda: inputs) if task.queued else task.source
    return Running(
        replace(task.facts, guaranteed=False),
        task.model,
        source,
        closed_loop=True,
        on_end=lambda job, output: ended.put(job),
        last=_WARM,
    )
