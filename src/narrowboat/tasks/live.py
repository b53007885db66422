"""Tasks that run, seen from the program that started them: offer inputs, change tasks or budget, stop."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from narrowboat.errors import ExecutorError, NarrowboatError, UsageError
from narrowboat.quantities import parse_bytes
from narrowboat.tasks.admission import Verdict
from narrowboat.tasks.execute.client import Child, error_told
from narrowboat.tasks.execute.wire import from_wire, to_wire
from narrowboat.tasks.measure import request
from narrowboat.tasks.record import Record
from narrowboat.tasks.task_set import TaskSet
from narrowboat.tasks.transition import Transition, plan_change


@dataclass(frozen=True)
class Answer:
    """What became of an input. Times in microseconds of the run.

    Attributes:
        output: of the network; None if it did not come to its end.
        outcome: "done", "late", "skipped", "aborted" or "failed".
        cause: why it is not "done"; empty otherwise.
        release: when it came.
        due: its deadline.
        finish: when it ended; None if it did not.
        bound: on the response, by the analysis; None where none was given.
    """

    output: Any
    outcome: str
    cause: str
    release: int
    due: int
    finish: int | None
    bound: int | None

    @property
    def response(self) -> int | None:
        """From release to finish."""
        return None if self.finish is None else self.finish - self.release

    @property
    def met(self) -> bool:
        """Whether the deadline was."""
        return self.outcome == "done"


class LiveRun:
    """A run under way; made by :meth:`TaskSet.start`. Its methods may be called from any thread.

    Args:
        task_set: admitted.
        seconds: for how long jobs are released; None until it is stopped.
        on_tick: called with pictures.

    Attributes:
        task_set: in force now.
    """

    def __init__(self, task_set: TaskSet, seconds: float | None, on_tick: Callable[[dict[str, Any]], None]) -> None:
        self.task_set = task_set
        self._tell, self._on_tick = task_set.tell, on_tick
        self._numbers = itertools.count()
        self._answers: dict[int, tuple[str, Future[Answer]]] = {}
        self._changes: dict[int, Future[None]] = {}
        self._changing = threading.Lock()
        self._started: Future[None] = Future()
        self._ended: Future[Record] = Future()
        self._child = Child(self._asked(task_set, "run", seconds=seconds))
        self._thread = threading.Thread(target=self._listen, name="narrowboat-run", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _asked(task_set: TaskSet, do: str, **more: Any) -> dict[str, Any]:
        return request(task_set.settings, task_set.folder, do, **task_set.arrangement(), **more)

    # -- what is asked ---------------------------------------------------------------------------------

    def submit(self, task: str, *inputs: Any) -> Future[Answer]:
        """Offer inputs to a task with ``input: {queue: ...}``: one job, now.

        Beyond the task's contract nothing is let in: the answer is "skipped" and says when the next may come.

        Args:
            task: its name.
            inputs: positional arguments of one pass: tensors, in lists or dictionaries where the network takes them.

        Returns:
            A future of the answer.

        Raises:
            UsageError: the task takes no inputs from a queue, or these cannot be sent.
            ExecutorError: the run has ended.
        """
        spec = next((spec for spec in self.task_set.settings.tasks if spec.name == task), None)
        if spec is None:
            names = ", ".join(spec.name for spec in self.task_set.settings.tasks)
            raise UsageError(f"there is no task {task!r}; there are {names}")
        if spec.input is None or spec.input.queue is None:
            raise UsageError(f"task {task!r} takes its inputs itself; give it `input: {{queue: NAME}}`")
        structure, payload = to_wire(list(inputs))
        number, future = next(self._numbers), Future[Answer]()
        self._answers[number] = task, future
        self._need_running()  # from here on whoever hears of the end sees the future
        self._child.tell({"do": "offer", "ticket": number, "task": task, "inputs": structure}, payload)
        return future

    def change(self, new: TaskSet) -> Verdict:
        """Go on with other tasks, or another budget, if admission allows it; returns when they are in force.

        New networks are opened beside the tasks that run and warm up as best effort; then, at an instant without
        work, the new set takes over. Refused or failed, everything stays as it was.

        Raises:
            AdmissionError: the new set does not hold, or changing to it would cost a deadline.
            NarrowboatError: a model, weights or inputs cannot be used.
            ExecutorError: the run has ended.
        """
        if not isinstance(new, TaskSet):
            raise UsageError(f"change() takes a TaskSet, such as nb.TaskSet.load(...), not a {type(new).__name__}")
        with self._changing:
            self._need_running()
            new.measures = False
            transition = plan_change(self.task_set, new)
            before = self.task_set
            room = transition.room
            if room is not None:
                self._go(room, budget=before.settings.budget)
                self.task_set = room.to
            try:
                self._go(transition)
            except NarrowboatError:
                if room is not None and self.running:
                    self._go(plan_change(room.to, before))
                    self.task_set = before
                raise
            self.task_set = transition.to
            return transition.to.admit()

    def _go(self, transition: Transition, budget: int | None = None) -> None:
        """Have it done; ``budget``: that is told where the set itself does with less."""
        number, future = next(self._numbers), Future[None]()
        self._changes[number] = future
        self._need_running()
        asked = self._asked(
            transition.to,
            "change",
            number=number,
            prepare_bytes=0 if transition.room is not None else transition.prepare_bytes,
            allowed_us=transition.allowed,
            warm_setup=transition.warm_setup,
        )
        if budget is not None:
            asked["settings"]["budget"] = asked["setup"]["budget_bytes"] = budget
        self._child.tell(asked)
        future.result()

    def set_budget(self, budget: int | str) -> Verdict:
        """The same tasks in another number of bytes. See :meth:`change`."""
        if isinstance(budget, float):
            raise UsageError(f"a budget is a whole number of bytes, or a string such as '256MiB', not {budget}")
        nbytes = parse_bytes(budget, what="budget")
        return self.change(self.task_set.with_settings(self.task_set.settings.model_copy(update={"budget": nbytes})))

    def stop(self) -> None:
        """Release no more jobs; those under way end."""
        self._child.tell({"do": "stop"})

    def wait(self, timeout: float | None = None) -> Record:
        """The record of the run, once it has ended.

        Raises:
            TimeoutError: it has not within so many seconds.
            ExecutorError: the process ended by itself.
        """
        return self._ended.result(timeout)

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return not self._ended.done()

    def _need_running(self) -> None:
        if self._ended.done():
            self._fail_open(ExecutorError("the run has ended"))
            raise ExecutorError("the run has ended")

    # -- what is told ----------------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            record = Record()
            for event in self._child.events():
                if event["event"] == "done":
                    record = Record.from_json(json.loads(event["payload"]))
                self._heard(event)
        except BaseException as error:
            told = error if isinstance(error, NarrowboatError) else ExecutorError(f"the run was lost: {error!r}")
            self._ended.set_exception(told)
            if not self._started.done():
                self._started.set_exception(told)
        else:
            self._ended.set_result(record)
        self._fail_open(ExecutorError("the run has ended"))

    def _heard(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            self._tell(event["said"])
        elif kind == "tick":
            self._on_tick(event)
        elif kind == "started":
            self._started.set_result(None)
        elif kind == "changed":
            self._changes.pop(event["number"]).set_result(None)
        elif kind == "refused":
            self._changes.pop(event["number"]).set_exception(error_told(event))
        elif kind == "answer":
            task, future = self._answers.pop(event["ticket"])
            output = from_wire(event["output"], event.get("payload", b"")) if event["output"] is not None else None
            bound = next((t.bound for t in self.task_set.admit().tasks if t.name == task), None)
            times = (event["release_us"], event["due_us"], event["finish_us"])
            future.set_result(Answer(output, event["outcome"], event["cause"], *times, bound))

    def _fail_open(self, error: ExecutorError) -> None:
        waiting: list[Future[Any]] = [*(future for _, future in self._answers.values()), *self._changes.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        self._answers.clear()
        self._changes.clear()

    def close(self) -> None:
        """End it now, whatever is under way."""
        self._child.process.kill()
        self._thread.join()
        self._child.close()

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
