"""Between clients and the executor: lets requests in, hands their tensors over, and tells what became of them."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from narrowboat.errors import (
    BadRequestError,
    BeyondContractError,
    ConflictError,
    ExpiredError,
    JobFailedError,
    NarrowboatError,
    NotServingError,
    RequestError,
    TooLargeError,
    UsageError,
)
from narrowboat.serve.aside import aside
from narrowboat.serve.catalogue import Catalogue
from narrowboat.serve.faces import Faces
from narrowboat.serve.hub import Hub, Subscription
from narrowboat.serve.interface import Reply, State, TaskFace
from narrowboat.serve.logs import log
from narrowboat.serve.plan import plan_of
from narrowboat.serve.settings import ServeSettings
from narrowboat.serve.supervisor import Supervisor
from narrowboat.serve.watch.watch import Watch
from narrowboat.serve.what_if import Question
from narrowboat.tasks.offers import LOST, Delivery
from narrowboat.tasks.record import BEYOND, EXPIRED, UNWANTED, WITHDRAWN, Record
from narrowboat.tasks.spec.schema import TaskSpec
from narrowboat.tasks.task_set import TaskSet
from narrowboat.tasks.tensors import RawTensor, TensorSpec

_SWITCH_INTERVAL = 0.0005  # seconds; an admission test beside must not hold answers up for Python's 5 ms
_ASKING = 4  # what-if questions that are judged or wait
_JUDGED = 20.0  # seconds that one may take
_COLLECT = (20_000, 20, 50)  # allocations and rounds between collections: a full one takes some ten milliseconds
_SOON = 1.0  # seconds after which a client may try again where nothing better is known
_PATHS = re.compile(r"(?:/[^/\s:]+)+/")  # of this machine: they are in the log, and no client's business
_RANKS = 1 << 32  # a request's priority comes before all that have none
_LONGEST = 1 << 50  # microseconds: a timeout beyond it is none


class LiveGateway:
    """See ``interface.Gateway``.

    Args:
        settings: of the gateway.
        tell: called with what takes long, in words.
        catalogue: of its tasks; read from the settings' files if left out.
        known: all of them, measured already.

    Attributes:
        state, said: see ``interface.Gateway``.
        watch: over the promise; metrics, spans and the trace of the last minute.

    Raises:
        TaskSpecError: the tasks' file, or one of the models' folder, cannot be used.
    """

    def __init__(
        self,
        settings: ServeSettings,
        tell: Callable[[str], None],
        catalogue: Catalogue | None = None,
        known: TaskSet | None = None,
    ) -> None:
        self.state: State = "starting"
        self.said = "measuring what the networks cost, if that is not known"
        self.watch = Watch()
        self._settings, self._tell = settings, tell
        self._catalogue = catalogue or Catalogue(settings.tasks, settings.models)
        self._known = known
        self._task_set: TaskSet | None = None
        self._faces = Faces(self._catalogue)
        self._hub = Hub(settings.limits.watchers)
        self._supervisor = Supervisor(self._ticked, self._executor_is)
        self._changing = asyncio.Lock()
        self._asking = asyncio.Semaphore(1)
        self._waiting = 0
        self._plan: dict[str, Any] = {}

    # -- from beginning to end -------------------------------------------------------------------------

    async def start(self) -> None:
        """Measure, admit, start the executor.

        Raises:
            AdmissionError: the tasks do not hold.
            NarrowboatError: a model, weights or inputs cannot be used.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL)
        gc.freeze()  # what was imported stays
        gc.set_threshold(*_COLLECT)
        self._known, first = await aside(self._measure)
        await self._supervisor.start(first)
        self._in_force(first)
        self._become("serving", "")

    def _measure(self) -> tuple[TaskSet, TaskSet]:
        known = self._known or TaskSet(self._catalogue.everything(), self._catalogue.folder)
        known.tell = self._tell
        known.costed  # noqa: B018 - measures, if that has not been done
        specs = tuple(self._catalogue.specs[name] for name in self._catalogue.first)
        first = known.with_settings(known.settings.model_copy(update={"tasks": specs}))
        first.require_runnable()
        return known, first

    async def drain(self, seconds: float) -> None:
        """Let nothing in any more; what is under way ends, within so many seconds."""
        self._become("draining", "the gateway has been told to end")
        try:
            await asyncio.wait_for(self._supervisor.stop(), timeout=max(seconds, 0.1))
        except TimeoutError:
            await self._supervisor.kill()

    async def close(self) -> None:
        """End everything."""
        await self._supervisor.kill()
        self._become("stopped", "")
        self._hub.close()
        await aside(self.watch.close)

    async def reload(self) -> None:
        """Read the file of tasks again and go on with what it says now.

        Raises:
            RequestError: refused; everything is as it was.
            TaskSpecError: the file cannot be used.
        """
        catalogue = await aside(lambda: Catalogue(self._settings.tasks, self._settings.models))

        def ask(now: TaskSet) -> TaskSet:
            known = TaskSet(catalogue.everything(), catalogue.folder)
            known.measures, known.tell = False, self._tell
            known.costed  # noqa: B018 - from the cache
            self._known = known
            specs = tuple(catalogue.specs[name] for name in catalogue.first)
            return known.with_settings(known.settings.model_copy(update={"tasks": specs}))

        before = self._catalogue, self._known
        try:
            await self._change(ask)
        except BaseException:
            self._known = before[1]
            raise
        self._tell(f"{self._settings.tasks.name} was read again: {len(catalogue.specs)} tasks")
        self._catalogue = catalogue
        self._faces = Faces(catalogue)
        self._in_force(self._running)

    # -- what is in force ------------------------------------------------------------------------------

    @property
    def _running(self) -> TaskSet:
        if self._task_set is None:
            raise NotServingError(f"{self.state}: {self.said}", retry_after=_SOON)
        return self._task_set

    def _in_force(self, task_set: TaskSet) -> None:
        live = self._supervisor.live
        self._task_set, self._plan = task_set, plan_of(task_set)
        self.watch.plan(self._plan, task_set.setup(task_set.facts()), **(live.last_change if live is not None else {}))
        if live is not None:
            self.watch.granted(live.granted)
        assert self._known is not None
        self._faces.renew(self._known, task_set)
        self._hub.publish({"event": "plan", "plan": self._plan})

    def _become(self, state: State, said: str) -> None:
        if self.state in ("draining", "stopped") and state not in ("draining", "stopped"):
            return
        self.state, self.said = state, said
        self.watch.state(state, said)
        self._hub.publish({"event": "state", "state": state, "said": said})

    def _executor_is(self, state: str, said: str) -> None:
        if state == "restarting":
            if self.state != "restarting":
                self.watch.restarted()
                self._hub.forget()
            self._tell(f"the executor is started anew: {said}")
            self._become("restarting", said)
            return
        live = self._supervisor.live
        if live is not None:
            self._in_force(live.task_set)
        self._become("serving", "")

    def _ticked(self, told: dict[str, Any]) -> None:
        event = {"event": "tick", **told}
        self.watch.tick(event)
        self._hub.publish(event)

    # -- what clients ask ------------------------------------------------------------------------------

    def faces(self) -> Sequence[TaskFace]:
        """See ``interface.Gateway``."""
        return self._faces.all()

    def face(self, name: str) -> TaskFace:
        """See ``interface.Gateway``."""
        return self._faces.one(name)

    async def infer(
        self, name: str, inputs: Mapping[str, RawTensor], *, timeout: int | None = None, priority: int = 0
    ) -> Reply:
        """See ``interface.Gateway``."""
        with self.watch.infer(name) as seen:
            face = self._open(name)
            if timeout is not None and timeout <= 0:
                raise ExpiredError(f"{name}: the request's deadline had passed when it came")
            tensors = _in_order(face, inputs)
            told = await self._job(name, tensors, timeout if timeout is None else min(timeout, _LONGEST), priority)
            reply = _reply(face, told, timeout)
            seen.answered(reply, None if told.start is None else told.start - told.release)
            return reply

    def _open(self, name: str) -> TaskFace:
        """The face of a task that takes requests now."""
        face = self._faces.one(name)
        if self.state != "serving":
            raise NotServingError(f"{self.state}: {self.said or 'try again'}", retry_after=_SOON)
        if not face.ready:
            raise NotServingError(f"task {name!r} is not admitted: {face.reason}")
        if not face.takes_requests:
            raise BadRequestError(f"task {name!r} takes its inputs itself: it has no `input: {{queue: NAME}}`")
        return face

    async def _job(self, name: str, tensors: Sequence[RawTensor], timeout: int | None, priority: int) -> Delivery:
        live = self._supervisor.live
        if live is None:
            raise NotServingError(f"{self.state}: {self.said}", retry_after=_SOON)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Delivery] = loop.create_future()

        def settle(told: Delivery) -> None:
            if not answer.done():
                answer.set_result(told)

        def ended(told: Delivery) -> None:
            if told.outcome == LOST:  # told from another thread
                loop.call_soon_threadsafe(settle, told)
            else:
                settle(told)

        def write(memory: memoryview, offsets: Sequence[int]) -> None:
            for tensor, offset in zip(tensors, offsets, strict=True):
                data = memoryview(tensor.data).cast("B")
                memory[offset : offset + len(data)] = data

        rank = priority - _RANKS if priority > 0 else 0
        ticket = live.offers.offer(name, write, ended, patience=timeout, rank=rank)
        try:
            return await answer
        except asyncio.CancelledError:
            live.offers.withdraw(ticket)
            raise

    async def load(self, name: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """See ``interface.Gateway``."""
        spec = self._catalogue.spec(name, fields)
        self._catalogue.check_unchanged()

        def ask(now: TaskSet) -> TaskSet:
            others = [task for task in now.settings.tasks if task.name != name]
            return self._with(now, [*others, spec])

        return await self._change(ask)

    async def unload(self, name: str) -> dict[str, Any]:
        """See ``interface.Gateway``."""
        self._catalogue.spec(name)

        def ask(now: TaskSet) -> TaskSet:
            left = [task for task in now.settings.tasks if task.name != name]
            if not left:
                raise ConflictError(f"{name} is the last task that runs: stop the gateway instead")
            return self._with(now, left)

        return await self._change(ask)

    async def run_only(self, names: Sequence[str]) -> dict[str, Any]:
        """Go on with exactly these tasks of the catalogue, in one change; the new plan. Raises as :meth:`load`."""
        specs = [self._catalogue.spec(name) for name in names]
        return await self._change(lambda now: self._with(now, specs))

    async def set_budget(self, budget: int | str) -> dict[str, Any]:
        """See ``interface.Gateway``."""
        nbytes = Question.budget_of(budget)

        def ask(now: TaskSet) -> TaskSet:
            return now.with_settings(now.settings.model_copy(update={"budget": nbytes}))

        return await self._change(ask)

    def _with(self, now: TaskSet, specs: Sequence[TaskSpec]) -> TaskSet:
        assert self._known is not None
        return self._known.with_settings(now.settings.model_copy(update={"tasks": tuple(specs)}))

    async def _change(self, ask: Callable[[TaskSet], TaskSet]) -> dict[str, Any]:
        """Go on with what ``ask`` makes of what runs, if admission allows it."""
        if self.state != "serving":
            raise NotServingError(f"{self.state}: {self.said}", retry_after=_SOON)
        if self._changing.locked():
            raise ConflictError("another change is under way: try again when it is done", retry_after=_SOON)
        async with self._changing:
            live = self._supervisor.live
            if live is None:
                raise NotServingError(f"{self.state}: {self.said}", retry_after=_SOON)
            try:
                await aside(lambda: live.change(ask(live.task_set)))
            except RequestError:
                raise
            except NarrowboatError as error:
                if not live.running:
                    raise NotServingError(f"{error}; nothing was changed", retry_after=_SOON) from error
                raise _conflict(error) from error
            finally:
                if live is self._supervisor.live and live.task_set is not self._task_set:
                    self._in_force(live.task_set)
            return self._plan

    async def what_if(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """See ``interface.Gateway``."""
        asked = Question(question, self._catalogue)
        now = self._running
        known = self._known
        assert known is not None
        if self._waiting >= _ASKING:
            raise BeyondContractError(f"{_ASKING} such questions are being judged or wait", retry_after=_SOON)
        self._waiting += 1
        try:
            async with self._asking:
                return await aside(partial(asked.answer, now, known), _JUDGED, stoppable=True)
        except TimeoutError:
            raise TooLargeError(
                f"judging this takes longer than {_JUDGED:g} s: ask about fewer tasks, fewer blocks, or periods that "
                "have more in common"
            ) from None
        finally:
            self._waiting -= 1

    def plan(self) -> dict[str, Any]:
        """See ``interface.Gateway``."""
        self._running  # noqa: B018 - or nothing is in force
        return self._plan

    def feed(self) -> Subscription:
        """See ``interface.Gateway``."""
        return self._hub.subscribe({"state": self.state, "said": self.said, "plan": self._plan or None})

    def record(self, seconds: float) -> Record:
        """See ``interface.Gateway``."""
        return self.watch.record(seconds)


def make_gateway(settings: ServeSettings, tell: Callable[[str], None]) -> LiveGateway:
    """The gateway of ``narrowboat serve``; it is still to be started.

    Raises:
        TaskSpecError: the tasks cannot be used.
    """
    return LiveGateway(settings, tell)


def _in_order(face: TaskFace, inputs: Mapping[str, RawTensor]) -> list[RawTensor]:
    """The tensors as the task takes them.

    Raises:
        BadRequestError: some are missing, unknown, or of another type or shape.
    """
    unknown = [name for name in inputs if all(name != spec.name for spec in face.inputs)]
    if unknown:
        takes = ", ".join(spec.name for spec in face.inputs) or "none"
        raise BadRequestError(f"task {face.name!r} has no input {unknown[0]!r}; it takes {takes}")
    return [_fitting(face.name, spec, inputs.get(spec.name)) for spec in face.inputs]


def _fitting(task: str, spec: TensorSpec, given: RawTensor | None) -> RawTensor:
    if given is None:
        raise BadRequestError(f"task {task!r}: input {spec.name!r} is missing")
    if given.datatype != spec.datatype or tuple(given.shape) != spec.shape:
        raise BadRequestError(
            f"task {task!r}: input {spec.name!r} is analysed for {spec.datatype} {list(spec.shape)}, "
            f"and this is {given.datatype} {list(given.shape)}"
        )
    nbytes = memoryview(given.data).nbytes
    if nbytes != spec.nbytes:
        raise BadRequestError(f"task {task!r}: input {spec.name!r} has {nbytes} bytes, and takes {spec.nbytes}")
    return given


def _reply(face: TaskFace, told: Delivery, timeout: int | None) -> Reply:
    if told.finish is None or told.outcome not in ("done", "late"):
        raise _refusal(face.name, told)
    response = told.finish - told.release
    deadline = face.deadline if timeout is None else min(face.deadline, timeout)
    outputs = tuple((spec, RawTensor(spec.datatype, spec.shape, data)) for spec, data in told.outputs)
    return Reply(outputs, face.guaranteed, face.bound, deadline, response, response <= deadline)


def _refusal(task: str, told: Delivery) -> RequestError:
    """What a client is told of a job that gave no answer."""
    cause = f"{task}: {told.cause}"
    if told.outcome == LOST:
        return NotServingError(f"{cause}; the request is lost", retry_after=_SOON)
    if told.outcome == "failed":
        log("failed", level=logging.ERROR, task=task, cause=told.cause)
        return JobFailedError(_PATHS.sub("", cause))
    if told.outcome == "aborted" or told.cause in (EXPIRED, UNWANTED, WITHDRAWN):
        return ExpiredError(cause)
    if told.cause.startswith(BEYOND):
        return BeyondContractError(cause, retry_after=told.wait / 1e6)
    if told.cause.startswith("no task"):
        return NotServingError(cause)
    return BeyondContractError(cause, retry_after=_SOON)


def _conflict(error: NarrowboatError) -> RequestError:
    """A change that was refused, with all that is known of why."""
    verdict = getattr(error, "verdict", None)
    details: dict[str, object] = {"reasons": [str(error)], "suggestions": []}
    if verdict is not None:
        details = {"reasons": list(verdict.reasons) or [str(error)], "suggestions": list(verdict.suggestions)}
    minimum = getattr(error, "minimum", None)
    if minimum is not None:
        details["minimum_bytes"] = minimum
    if isinstance(error, UsageError) and verdict is None:
        return BadRequestError(str(error), details=details)
    return ConflictError(str(error), details=details)
