"""Tasks that run, seen from the program that started them: offer inputs, change tasks or budget, stop."""

from __future__ import annotations

import itertools
import json
import os
import select
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from narrowboat.errors import ExecutorError, NarrowboatError, UsageError
from narrowboat.machine.about import about
from narrowboat.quantities import parse_bytes
from narrowboat.tasks.admission import Verdict
from narrowboat.tasks.execute.client import Child, error_told
from narrowboat.tasks.execute.exchange import Exchange
from narrowboat.tasks.measure import request
from narrowboat.tasks.offers import LOST, Delivery, Form, Offers
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
        keep: of jobs and block segments the record holds so many, the last ones; None for all, which a run without
            an end has no memory for.
        collected: somebody else calls :meth:`collect` whenever one of ``descriptors`` can be read.

    Attributes:
        task_set: in force now.
        offers: of jobs, by their tensors' bytes; :meth:`submit` is the same for PyTorch's tensors.
        descriptors: that can be read when there are answers or pictures.
        granted: what the system granted the executor's threads.
        last_change: of tasks or budget: when it began and ended, and what it was allowed to take, microseconds of the
            run; empty before the first.
    """

    def __init__(
        self,
        task_set: TaskSet,
        seconds: float | None,
        on_tick: Callable[[dict[str, Any]], None],
        *,
        keep: int | None = None,
        collected: bool = False,
    ) -> None:
        self.task_set = task_set
        self.granted: dict[str, Any] = {}
        self.last_change: dict[str, int] = {}
        self._tell, self._on_tick = task_set.tell, on_tick
        self._numbers = itertools.count()
        self._changes: dict[int, Future[None]] = {}
        self._changing = threading.Lock()
        self._started: Future[None] = Future()
        self._ended: Future[Record] = Future()
        self._exchange = Exchange.create()
        self._gone = os.eventfd(0, os.EFD_NONBLOCK)
        self.descriptors = (self._exchange.answers.items, self._exchange.events.items)
        self.offers = Offers(self._exchange)
        self._collector: threading.Thread | None = None
        try:
            forms = self._forms(task_set)
            self.offers.put_in_force(forms)
            self._child = Child(self._asked(task_set, forms, "run", seconds=seconds, keep=keep), self._exchange)
        except BaseException:
            self._release()
            raise
        self._thread = threading.Thread(target=self._listen, name="narrowboat-run", daemon=True)
        self._thread.start()
        if not collected:
            self._collector = threading.Thread(target=self._collect, name="narrowboat-answers", daemon=True)
            self._collector.start()
        try:
            self._started.result()
        except BaseException:
            self.close()
            raise

    def _forms(self, task_set: TaskSet) -> dict[str, Form]:
        return self.offers.forms_for(task_set.settings.tasks, task_set.about("signatures"))

    @staticmethod
    def _asked(task_set: TaskSet, forms: Mapping[str, Form], do: str, **more: Any) -> dict[str, Any]:
        written = {form.number: form.signature.as_json() for form in forms.values()}
        return request(task_set.settings, task_set.folder, do, **task_set.arrangement(), forms=written, **more)

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
        from narrowboat.tasks.execute.wire import join, lay_down, over, shapes, spec_of, split

        structure, tensors = split(list(inputs))
        self._need_running()
        signature, future = self.offers.signature(task), Future[Answer]()
        given = shapes(structure, [spec_of("", tensor) for tensor in tensors])
        wanted = shapes(signature.takes, signature.inputs)
        if given != wanted:  # inputs of another shape cost something else than was analysed
            cause = f"the task was analysed for inputs {wanted}, and these are {given}"
            future.set_result(Answer(None, "failed", cause, 0, 0, None, self._bound(task)))
            return future

        def write(memory: memoryview, offsets: Sequence[int]) -> None:
            for tensor, offset, into in zip(tensors, offsets, signature.inputs, strict=True):
                lay_down(tensor, memory, offset, into)

        def ended(told: Delivery) -> None:
            if told.outcome == LOST:
                future.set_exception(ExecutorError(told.cause))
                return
            output = None
            if told.finish is not None:
                found = [over(memoryview(bytearray(data)), 0, spec) for spec, data in told.outputs]
                output = join(told.gives, found) if told.gives is not None else None
            times = (told.release, told.due, told.finish)
            future.set_result(Answer(output, told.outcome, told.cause, *times, self._bound(task)))

        self.offers.offer(task, write, ended)
        return future

    def _bound(self, task: str) -> int | None:
        return next((told.bound for told in self.task_set.admit().tasks if told.name == task), None)

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
        forms = self._forms(transition.to)
        asked = self._asked(
            transition.to,
            forms,
            "change",
            number=number,
            prepare_bytes=0 if transition.room is not None else transition.prepare_bytes,
            allowed_us=transition.allowed,
            warm_setup=transition.warm_setup,
        )
        if budget is not None:
            asked["settings"]["budget"] = asked["setup"]["budget_bytes"] = budget
        self._child.tell(asked)
        try:
            future.result()
        except BaseException:
            self.offers.give_up(forms)
            raise
        self.offers.put_in_force(forms)

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
    def ended(self) -> Future[Record]:
        """The record, once it has ended; or the ExecutorError."""
        return self._ended

    def kill(self) -> None:
        """End the process; :meth:`close` is still to be called."""
        self._child.process.kill()

    @property
    def pid(self) -> int:
        """Of the executor's process."""
        return self._child.process.pid

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
                if event["event"] == "done" and event["record"] is not None:
                    record = Record.from_json(event["record"])
                    record.about = about()
                self._heard(event)
        except BaseException as error:
            told = error if isinstance(error, NarrowboatError) else ExecutorError(f"the run was lost: {error!r}")
            self.offers.end(ExecutorError(str(told)))
            self._ended.set_exception(told)
            if not self._started.done():
                self._started.set_exception(told)
        else:
            if self._collector is not None:
                os.eventfd_write(self._gone, 1)
                self._collector.join()
            self._ended.set_result(record)
        self._fail_open(ExecutorError("the run has ended"))

    def _collect(self) -> None:
        """The thread that collects, where nobody else does."""
        while select.select([*self.descriptors, self._gone], [], [])[0] != [self._gone]:
            self.collect()

    def collect(self) -> None:
        """Take what the executor has told: answers, whose receivers are called from here, and pictures."""
        self.offers.collect()
        for message in self._exchange.events.take():
            self._on_tick(json.loads(message))

    def _heard(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "progress":
            self._tell(event["said"])
        elif kind == "started":
            self.granted = event["real_time"]
            self._started.set_result(None)
        elif kind == "changed":
            self.last_change = {key: event[key] for key in ("begin", "end", "allowed")}
            self._changes.pop(event["number"]).set_result(None)
        elif kind == "refused":
            self._changes.pop(event["number"]).set_exception(error_told(event))

    def _fail_open(self, error: ExecutorError) -> None:
        self.offers.end(error)
        for future in list(self._changes.values()):
            if not future.done():
                future.set_exception(error)
        self._changes.clear()

    def close(self) -> None:
        """End it now, whatever is under way."""
        self._child.process.kill()
        self._thread.join()
        self._child.close()
        self._release()

    def _release(self) -> None:
        if self._gone < 0:
            return
        if self._collector is not None and self._collector is not threading.current_thread():
            os.eventfd_write(self._gone, 1)
            self._collector.join()
        self._exchange.close()
        os.close(self._gone)
        self._gone = -1

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
