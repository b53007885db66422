"""A gateway without an executor, for the tests of the front rooms.

    gateway = FakeGateway()                     # the tasks of FACES, one budget, a plan
    gateway.fail("identity", BeyondContractError("too soon", retry_after=0.4))   # the next request is refused
    gateway.delay("identity", 0.2)              # each answer takes that long (so that it can be cancelled)
    gateway.feed()                              # hello, then the ticks that the test pushes or `tick_forever` makes
    gateway.push(tick(gateway, 1))              # to every subscriber

What is asked of it is kept: ``asked`` (inferences), ``changes`` (load, unload, set_budget), ``cancelled`` (a count).
Networks are numpy functions, so an answer can be checked. Nothing here sleeps, unless it is told to.
"""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from narrowboat.errors import BadRequestError, ConflictError, JobFailedError, NoSuchTaskError, NotServingError
from narrowboat.serve.interface import Reply, State, TaskFace
from narrowboat.serve.oip.codec import NUMPY
from narrowboat.serve.what_if import Question
from narrowboat.tasks.record import JobRecord, Record, Segment
from narrowboat.tasks.tensors import SIZES, RawTensor, TensorSpec

MIB = 1 << 20

Network = Callable[[Mapping[str, RawTensor]], list[RawTensor]]


def raw(datatype: str, array: Any) -> RawTensor:
    """A tensor of a numpy array, or of whatever makes one."""
    given = np.ascontiguousarray(array, NUMPY[datatype])
    return RawTensor(datatype, given.shape, given.tobytes())


def values(tensor: RawTensor) -> np.ndarray:
    """The numpy array of a tensor (not of BF16)."""
    return np.frombuffer(tensor.data, NUMPY[tensor.datatype]).reshape(tensor.shape)


def same(inputs: Mapping[str, RawTensor]) -> list[RawTensor]:
    """The identity: every input is an output."""
    return [RawTensor(tensor.datatype, tensor.shape, bytes(tensor.data)) for tensor in inputs.values()]


def add(inputs: Mapping[str, RawTensor]) -> list[RawTensor]:
    """Sum and difference of two inputs, as Triton's example "simple"."""
    a, b = (values(tensor) for tensor in inputs.values())
    datatype = next(iter(inputs.values())).datatype
    return [raw(datatype, a + b), raw(datatype, a - b)]


def classify(inputs: Mapping[str, RawTensor]) -> list[RawTensor]:
    """Scores of three classes: the mean of each colour of an image [1, 3, h, w]."""
    (image,) = inputs.values()
    return [raw("FP32", values(image).mean(axis=(2, 3)))]


def _face(
    name: str, inputs: Sequence[TensorSpec] = (), outputs: Sequence[TensorSpec] = (), **fields: Any
) -> tuple[str, TaskFace]:
    usual: dict[str, Any] = {
        "model": f"zoo:{name}",
        "ready": True,
        "takes_requests": True,
        "guaranteed": True,
        "bound": 8_000,
        "deadline": 20_000,
        "period": 20_000,
        "burst": 2,
    }
    return name, TaskFace(name=name, inputs=tuple(inputs), outputs=tuple(outputs), **{**usual, **fields})


_PAIR = [TensorSpec(name, "INT32", (1, 16)) for name in ("INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1")]
FACES: dict[str, TaskFace] = dict(
    [
        _face("identity", [TensorSpec("x", "FP32", (1, 8))], [TensorSpec("y", "FP32", (1, 8))]),
        _face("simple", _PAIR[:2], _PAIR[2:]),
        _face(
            "types",
            [TensorSpec(f"in_{name.lower()}", name, (2, 3)) for name in SIZES],
            [TensorSpec(f"out_{name.lower()}", name, (2, 3)) for name in SIZES],
            guaranteed=False,
            bound=None,
        ),
        _face(
            "colours",
            [TensorSpec("image", "FP32", (1, 3, 8, 8))],
            [TensorSpec("scores", "FP32", (1, 3))],
            facts={
                "labels": ["red", "green", "blue"],
                "image": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
            },
        ),
        # Takes its inputs itself, so it takes no requests.
        _face("camera", [TensorSpec("x", "FP32", (1, 4))], [TensorSpec("y", "FP32", (1, 4))], takes_requests=False),
        # Known, and can be loaded.
        _face(
            "spare",
            [TensorSpec("x", "FP32", (1, 4))],
            [TensorSpec("y", "FP32", (1, 4))],
            ready=False,
            reason="not loaded",
            bound=None,
        ),
    ]
)
NETWORKS: dict[str, Network] = {"simple": add, "colours": classify}  # the others are the identity
BLOCK_BYTES, RESIDENT_BYTES, BLOCKS = 8 * MIB, 2 * MIB, 3  # of each task
PINNED_BYTES = BLOCKS * RESIDENT_BYTES


@dataclass
class Asked:
    """One inference that was asked for."""

    name: str
    inputs: dict[str, RawTensor]
    timeout: int | None
    priority: int


class FakeFeed:
    """What one subscriber sees: "hello", then what is pushed; the oldest go first when it is slow."""

    def __init__(self, gateway: FakeGateway, first: dict[str, Any], limit: int) -> None:
        self._gateway, self._limit = gateway, limit
        self._waiting: deque[dict[str, Any]] = deque([first])
        self._lost = 0
        self._bell = asyncio.Event()
        self.closed = False

    def put(self, event: dict[str, Any]) -> None:
        """One more event; the oldest is lost beyond the limit."""
        if len(self._waiting) >= self._limit:
            self._waiting.popleft()
            self._lost += 1
        self._waiting.append(event)
        self._bell.set()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        while not self.closed:
            if self._lost:
                lost, self._lost = self._lost, 0
                yield {"event": "lost", "events": lost}
            if self._waiting:
                yield self._waiting.popleft()
                continue
            self._bell.clear()
            await self._bell.wait()

    def close(self) -> None:
        """No more; also ends whoever iterates."""
        self.closed = True
        self._bell.set()
        self._gateway.feeds.discard(self)


class FakeGateway:
    """``narrowboat.serve.interface.Gateway`` without an executor.

    Args:
        faces: of the tasks; ``FACES`` if left out.
        networks: what each computes; the identity where none is given.
        budget: bytes of all.
        subscribers: at most so many feeds.

    Attributes:
        asked: every inference, in order, refused ones too.
        changes: every change that was asked for, as ``(method, arguments)``.
        cancelled: inferences that were cancelled while they waited.
        running: inferences under way now.
    """

    def __init__(
        self,
        faces: Iterable[TaskFace] | None = None,
        networks: Mapping[str, Network] | None = None,
        *,
        budget: int = 64 * MIB,
        subscribers: int = 8,
    ) -> None:
        self.state: State = "serving"
        self.said = ""
        self.budget = budget
        self.subscribers = subscribers
        self.asked: list[Asked] = []
        self.changes: list[tuple[str, Any]] = []
        self.cancelled = self.running = 0
        self.feeds: set[FakeFeed] = set()
        self.ticks: deque[dict[str, Any]] = deque(maxlen=300)
        self.done: dict[str, int] = defaultdict(int)
        self.missed: dict[str, int] = defaultdict(int)
        self._faces = {face.name: face for face in (FACES.values() if faces is None else faces)}
        self._networks = dict(NETWORKS if networks is None else networks)
        self._errors: dict[str, deque[Exception]] = defaultdict(deque)
        self._refusals: deque[Exception] = deque()
        self._delays: dict[str, float] = {}

    # -- what a test scripts ---------------------------------------------------------------------------

    def fail(self, name: str, *errors: Exception) -> None:
        """The next requests to a task end in these, one each; then it answers again."""
        self._errors[name].extend(errors)

    def refuse(self, *errors: Exception) -> None:
        """The next load, unload, set_budget or what_if end in these, one each."""
        self._refusals.extend(errors)

    def delay(self, name: str, seconds: float) -> None:
        """Every answer of a task takes so long; ``math.inf`` never comes."""
        self._delays[name] = seconds

    def set_state(self, state: State, said: str = "") -> None:
        """Another state; subscribers hear of it."""
        self.state, self.said = state, said
        self._tell({"event": "state", "state": state, "said": said})

    def push(self, event: dict[str, Any]) -> None:
        """An event to all subscribers; ticks are kept for those who come later."""
        if event["event"] == "tick":
            self.ticks.append(event)
        self._tell(event)

    async def tick_forever(self, every: float = 0.1) -> None:
        """Push ticks until cancelled, as a gateway whose executor runs."""
        number = len(self.ticks)
        while True:
            self.push(tick(self, number))
            number += 1
            await asyncio.sleep(every)

    def _tell(self, event: dict[str, Any]) -> None:
        for feed in list(self.feeds):
            feed.put(event)

    # -- the protocol ----------------------------------------------------------------------------------

    def faces(self) -> Sequence[TaskFace]:
        """All tasks, by name."""
        return [self._faces[name] for name in sorted(self._faces)]

    def face(self, name: str) -> TaskFace:
        """One of them, or NoSuchTaskError."""
        try:
            return self._faces[name]
        except KeyError:
            raise NoSuchTaskError(f"there is no task {name!r}; there are {', '.join(sorted(self._faces))}") from None

    async def infer(
        self, name: str, inputs: Mapping[str, RawTensor], *, timeout: int | None = None, priority: int = 0
    ) -> Reply:
        """What the task's network makes of the inputs, after its delay; or the error that is scripted."""
        face = self.face(name)
        self.asked.append(Asked(name, dict(inputs), timeout, priority))
        if self.state != "serving":
            raise NotServingError(f"the gateway is {self.state}: {self.said}", retry_after=1.0)
        if not face.ready:
            raise NotServingError(f"task {name!r} is not admitted: {face.reason}")
        if not face.takes_requests:
            raise BadRequestError(f"task {name!r} takes its inputs itself; it has no `input: {{queue: NAME}}`")
        if self._errors[name]:
            raise self._errors[name].popleft()
        self._check(face, inputs)
        if wait := self._delays.get(name):
            self.running += 1
            try:
                await (asyncio.Event().wait() if wait == math.inf else asyncio.sleep(wait))
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.running -= 1
        try:
            made = self._networks.get(name, same)({spec.name: inputs[spec.name] for spec in face.inputs})
        except Exception as wrong:
            raise JobFailedError(f"task {name!r} failed: {wrong}") from wrong
        self.done[name] += 1
        deadline = face.deadline if timeout is None else min(face.deadline, timeout)
        outputs = tuple(zip(face.outputs, made, strict=True))
        return Reply(outputs, face.guaranteed, face.bound, deadline, response=1_234, met=True)

    @staticmethod
    def _check(face: TaskFace, inputs: Mapping[str, RawTensor]) -> None:
        """As the real one: whatever a front lets through that is not the face's is its fault, and is found here."""
        assert set(inputs) == {spec.name for spec in face.inputs}, f"inputs {sorted(inputs)} of {face.name}"
        for spec in face.inputs:
            given = inputs[spec.name]
            assert (given.datatype, tuple(given.shape)) == (spec.datatype, spec.shape), spec
            assert memoryview(given.data).nbytes == spec.nbytes, spec

    async def load(self, name: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """It is ready from now on, unless refused."""
        face = self.face(name)
        self._change("load", (name, dict(fields) if fields is not None else None))
        self._faces[name] = replace(face, ready=True, reason="", bound=8_000)
        try:
            self._fit()
        except ConflictError:
            self._faces[name] = face
            raise
        return self._planned()

    async def unload(self, name: str) -> dict[str, Any]:
        """It is not ready from now on."""
        face = self.face(name)
        self._change("unload", name)
        self._faces[name] = replace(face, ready=False, reason="not loaded", bound=None)
        return self._planned()

    async def set_budget(self, budget: int | str) -> dict[str, Any]:
        """Other bytes, if the tasks fit them."""
        self._change("set_budget", budget)
        before, self.budget = self.budget, Question.budget_of(budget)
        try:
            self._fit()
        except ConflictError:
            self.budget = before
            raise
        return self._planned()

    def _change(self, method: str, arguments: Any) -> None:
        self.changes.append((method, arguments))
        if self._refusals:
            raise self._refusals.popleft()
        if self.state != "serving":
            raise NotServingError(f"the gateway is {self.state}", retry_after=1.0)

    def _fit(self) -> None:
        plan = self.plan()
        if not plan["admitted"]:
            details = {key: plan[key] for key in ("reasons", "suggestions")}
            raise ConflictError("; ".join(plan["reasons"]), details=details)

    def _planned(self) -> dict[str, Any]:
        plan = self.plan()
        self._tell({"event": "plan", "plan": plan})
        return plan

    async def what_if(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The plan that would be, with no change."""
        if self._refusals:
            raise self._refusals.popleft()
        unknown = set(question) - {"budget", "add", "remove"}
        if unknown:
            raise BadRequestError(f"unknown field {sorted(unknown)[0]!r}; there are budget, add and remove")
        faces = {face.name: face for face in self._faces.values() if face.ready}
        for name in question.get("remove", []):
            if name not in faces:
                raise BadRequestError(f"remove: there is no task {name!r}")
            del faces[name]
        for fields in question.get("add", []):
            if "name" not in fields:
                raise BadRequestError("add: a task needs a name")
            faces[fields["name"]] = _face(fields["name"], model=str(fields.get("model", "zoo:new")))[1]
        try:
            budget = Question.budget_of(question.get("budget", self.budget))
        except ValueError as wrong:
            raise BadRequestError(f"budget: {wrong}") from wrong
        plan = make_plan(faces.values(), budget)
        change = {"pause_us": 40_000, "allowed_us": 900_000} if plan["admitted"] else None
        return {**{key: plan[key] for key in ("admitted", "reasons", "suggestions")}, "plan": plan, "change": change}

    def plan(self) -> dict[str, Any]:
        """Of the tasks that are ready."""
        return make_plan((face for face in self.faces() if face.ready), self.budget)

    def feed(self) -> FakeFeed:
        """Subscribe, or NotServingError beyond the limit."""
        if len(self.feeds) >= self.subscribers:
            raise NotServingError(f"{self.subscribers} subscribers are the most", retry_after=5.0)
        hello = {"event": "hello", "state": self.state, "said": self.said, "plan": self.plan()}
        feed = FakeFeed(self, {**hello, "ticks": list(self.ticks)}, limit=64)
        self.feeds.add(feed)
        return feed

    def record(self, seconds: float) -> Record:
        """One job of each task, one after another, in the last tenth of a second."""
        record = Record(setup={"tasks": [], "budget": self.budget}, end=100_000)
        for number, face in enumerate(face for face in self.faces() if face.ready):
            begin = number * 10_000
            record.jobs.append(JobRecord(face.name, 0, begin, begin + face.deadline, begin, begin + 5_000, 0, "done"))
            record.segments += [
                Segment("load", "load", face.name, 0, 0, begin, begin + 2_000, BLOCK_BYTES),
                Segment("compute", "compute", face.name, 0, 0, begin + 2_000, begin + 5_000),
            ]
            record.memory.append((begin, PINNED_BYTES + BLOCK_BYTES))
        return record


def make_plan(faces: Iterable[TaskFace], budget: int) -> dict[str, Any]:
    """A plausible plan: every task has ``BLOCKS`` blocks; all of one task's and a block of each other are in."""
    faces = list(faces)
    tasks = [_planned(face) for face in faces]
    pinned = PINNED_BYTES * len(tasks)
    pool = (2 * BLOCK_BYTES if tasks else 0) + BLOCK_BYTES // 4 * max(0, len(tasks) - 1)
    needed = pinned + pool
    admitted = needed <= budget
    reasons = [] if admitted else [f"the tasks need {needed} bytes at the worst instant; the budget is {budget}"]
    return {
        "budget_bytes": budget,
        "needed_bytes": needed,
        "pinned_bytes": pinned,
        "pool_bytes": pool,
        "always_bytes": pinned,
        "policy": "edf",
        "preemption": "lp-keep",
        "supply": {"share": 0.95, "delay_us": 50_000},
        "admitted": admitted,
        "overrun_tolerance_us": 900_000,
        "utilisation": sum(task["utilisation"] for task in tasks),
        "reasons": reasons,
        "suggestions": [] if admitted else [f"budget: {-(-needed // MIB)}MiB"],
        "tasks": [{**task, "admitted": admitted} for task in tasks],
    }


def _planned(face: TaskFace) -> dict[str, Any]:
    cost = 3_000
    block = {"bytes": BLOCK_BYTES, "resident_bytes": RESIDENT_BYTES, "load_us": 800, "compute_us": 900}
    return {
        "name": face.name,
        "model": face.model,
        "guarantee": "guaranteed" if face.guaranteed else "best-effort",
        "takes_requests": face.takes_requests,
        "response_bound_us": face.bound,
        "deadline_us": face.deadline,
        "period_us": face.period,
        "burst": face.burst,
        "cost_us": cost,
        "longest_segment_us": 900,
        "utilisation": cost / face.period,
        "pinned_bytes": PINNED_BYTES,
        "running_bytes": 2 * BLOCK_BYTES,
        "blocks": [dict(block) for _ in range(BLOCKS)],
    }


def tick(gateway: FakeGateway, number: int) -> dict[str, Any]:
    """The picture of one tenth of a second, the ``number``th: tasks take turns, one job each, all in time."""
    ready = [face for face in gateway.faces() if face.ready]
    now = number * 100_000
    face = ready[number % len(ready)]
    block = number % BLOCKS
    swap = BLOCK_BYTES + BLOCK_BYTES * (number % 2)
    resident = PINNED_BYTES * len(ready)
    begin = now - 90_000
    job = {"task": face.name, "number": number, "release": begin, "due": begin + face.deadline}
    ended = {**job, "start": begin + 100, "finish": begin + 5_000, "preemptions": 0, "outcome": "done", "cause": ""}
    return {
        "event": "tick",
        "now_us": now,
        "time": 1_700_000_000.0 + number / 10,
        "held_bytes": resident + swap + MIB,
        "budget_bytes": gateway.budget,
        "peak_bytes": resident + 2 * BLOCK_BYTES + MIB,
        "pools": {"resident": resident, "swap": swap, "swap_limit": gateway.plan()["pool_bytes"], "other": MIB},
        "busy": {"compute": 0.6, "load": 0.3},
        "busy_us": {"compute": 60_000 * number, "load": 30_000 * number},
        "doing": {"compute": f"{face.name} block {block}", "load": f"{face.name} block {(block + 1) % BLOCKS}"},
        "pending": [f"{face.name} #{number}"],
        "in": {face.name: [block]},
        "coming": {face.name: (block + 1) % BLOCKS},
        "tasks": {
            one.name: {
                "done": number // len(ready) + gateway.done[one.name],
                "missed": gateway.missed[one.name],
                "slack_us": one.deadline - 5_000,
                "held_bytes": PINNED_BYTES + (swap if one is face else 0),
            }
            for one in ready
        },
        "jobs": [ended],
        "jobs_lost": 0,
        "segments": [
            ["load", "load", face.name, number, block, begin + 100, begin + 2_000, BLOCK_BYTES],
            ["compute", "compute", face.name, number, block, begin + 2_000, begin + 5_000, 0],
        ],
        "segments_lost": 0,
        "counters": {
            "overruns": 0,
            "prefetch_hit": number,
            "prefetch_aborted": 0,
            "prefetch_wasted": 0,
            "blocks_found": number // 2,
        },
        "late_wake_us": 80,
    }
