"""The fields of ``tasks.yaml``. Their descriptions are the documentation and the published JSON schema."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from narrowboat.errors import QuantityError
from narrowboat.machine.device_name import parse_device
from narrowboat.quantities import parse_bytes, parse_seconds

MICROSECONDS = 1_000_000
_LONGEST = 366 * 86_400  # seconds


def _exact(value: Any) -> Fraction:
    """Microseconds of "20ms", or of a bare number of seconds."""
    try:
        seconds = parse_seconds(value, what="time")
    except QuantityError as error:
        raise ValueError(str(error).removeprefix("time ")) from error
    if seconds > _LONGEST:
        raise ValueError(f"{value!r} is longer than a year")
    # A decimal such as 0.0021 s is not a whole number of microseconds in binary: what is meant is the decimal.
    return Fraction(f"{seconds:.12f}") * MICROSECONDS


def _cost(value: Any) -> int:
    """Whole microseconds, rounded up: what tasks cost is never taken for less."""
    return math.ceil(_exact(value))


def _span(value: Any) -> int:
    """Whole microseconds, rounded down: what tasks have is never taken for more."""
    exact = _exact(value)
    if 0 < exact < 1:
        raise ValueError(f"{value!r} is shorter than a microsecond, the shortest time there is here")
    return math.floor(exact)


def _bytes(value: Any) -> int:
    if not isinstance(value, bool) and str(value).strip().rstrip("kKmMgGiIbB ") in ("0", "0.0"):
        return 0
    if str(value).strip().startswith("-"):
        raise ValueError(f"{value!r}: a size cannot be negative")
    try:
        return parse_bytes(value, what="size")
    except QuantityError as error:
        raise ValueError(str(error).removeprefix("size ")) from error


def _positive(value: int) -> int:
    if value <= 0:
        raise ValueError("must be more than zero")
    return value


def _device(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no device: use cpu, cuda or cuda:N")
    parse_device(value)
    return value.strip()


_TIME_SCHEMA = {
    "anyOf": [{"type": "string", "pattern": r"^\s*[0-9.]+\s*(ns|us|µs|ms|s|min|h)?\s*$"}, {"type": "number"}],
    "description": "A time such as 20ms; a bare number is seconds.",
}
_BYTES_SCHEMA = {
    "anyOf": [{"type": "string"}, {"type": "integer"}],
    "description": "Bytes, such as 300MiB or 20MB; a bare number is bytes.",
}
Cost = Annotated[int, BeforeValidator(_cost), WithJsonSchema(_TIME_SCHEMA)]
Span = Annotated[int, BeforeValidator(_span), AfterValidator(_positive), WithJsonSchema(_TIME_SCHEMA)]
Bytes = Annotated[int, BeforeValidator(_bytes), WithJsonSchema(_BYTES_SCHEMA)]
Device = Annotated[
    str,
    BeforeValidator(_device),
    WithJsonSchema({"type": "string", "pattern": r"^\s*(cpu|cuda(:\d+)?|emulated:.+)\s*$"}),
]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Policy = Literal["edf", "fp"]
Preemption = Literal["lp-keep", "np"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockSpec(_Strict):
    """One block of a task that is described instead of measured."""

    load: Annotated[Cost, Field(description="Worst time to read its weights.")] = 0
    compute: Annotated[Cost, Field(description="Worst time to run it.")] = 0
    bytes: Annotated[Bytes, Field(description="Of its weights.")] = 0
    pinned: Annotated[bool, Field(description="Its weights stay in memory: no load, and its bytes always count.")] = (
        False
    )

    @model_validator(mode="after")
    def _takes_time(self) -> BlockSpec:
        if self.load + self.compute <= 0:
            raise ValueError("a block must load or compute for some time")
        return self


class Contract(_Strict):
    """A client's right to send: a bucket of ``burst`` tokens that gains one every ``period``."""

    burst: Annotated[int, Field(ge=1, le=10_000, description="Most jobs at once.")] = 1
    period: Annotated[Span, Field(description="In which one more may come.")]


class SupplySpec(_Strict):
    """What of the processor is there for the tasks, at least: ``share * (d - delay)`` in any time ``d``."""

    share: Annotated[float, Field(ge=0.001, le=1, description="Of the core, in the long run.")] = 1.0
    delay: Annotated[Cost, Field(description="Longest time without the core.")] = 0


class InputSpec(_Strict):
    """Where a task's inputs come from: one of the four."""

    file: Annotated[str | None, Field(description="An image or .npy file, the same for every job.")] = None
    folder: Annotated[str | None, Field(description="Of such files, taken in turn by name.")] = None
    generator: Annotated[
        str | None, Field(description="package.module:function that yields inputs; or 'example'.")
    ] = None
    queue: Annotated[str | None, Field(description="Name of a queue that the program or the gateway fills.")] = None

    @model_validator(mode="after")
    def _one(self) -> InputSpec:
        if sum(value is not None for value in (self.file, self.folder, self.generator, self.queue)) != 1:
            raise ValueError("give exactly one of file, folder, generator, queue")
        return self


class StorageSpec(_Strict):
    """The storage that weights are read from, where it is known better than measured."""

    bandwidth: Annotated[Bytes | None, Field(description="Bytes per second, such as 1.5GB.")] = None
    chunk: Annotated[Bytes, Field(description="Bytes read at once: a prefetch can be given up between two.")] = 1 << 20


class TaskSpec(_Strict):
    """One task."""

    name: Name
    model: Annotated[
        str | None,
        Field(
            description="package.module:factory, zoo:NAME, a Hugging Face folder; or text:FOLDER?window=64 for its "
            "next token, embed:FOLDER?window=128 for a sentence's embedding."
        ),
    ] = None
    weights: Annotated[str | None, Field(description="The weights file; relative to tasks.yaml.")] = None
    input: Annotated[InputSpec | None, Field(description="The model's example inputs if left out.")] = None
    labels: Annotated[
        str | None, Field(description="Names of what it tells apart: a text file, one a line, or 'imagenet'.")
    ] = None
    blocks: Annotated[
        tuple[BlockSpec, ...] | None,
        Field(min_length=1, max_length=4096, description="Instead of a model: what it costs."),
    ] = None
    activation_bytes: Annotated[Bytes, Field(description="With blocks: what one job holds beside weights.")] = 0
    period: Annotated[Span | None, Field(description="Least time between two jobs.")] = None
    jitter: Annotated[Cost, Field(description="By how much a release may be late.")] = 0
    contract: Annotated[Contract | None, Field(description="Instead of a period: a token bucket.")] = None
    deadline: Annotated[Span | None, Field(description="From release; the period if left out.")] = None
    importance: Annotated[float, Field(gt=0, le=1e6, description="Weight of its slowdown.")] = 1.0
    priority: Annotated[int | None, Field(description="Larger is more important; by deadline if left out.")] = None
    pinned: Annotated[bool, Field(description="All its weights stay in memory.")] = False
    guarantee: Literal["guaranteed", "best-effort"] = "guaranteed"
    overrun: Annotated[
        Literal["finish", "abort", "degrade"],
        Field(description="A job over its budget: let it end, end it at a boundary, or go on as best effort."),
    ] = "finish"
    offset: Annotated[Cost, Field(description="First release after the start.")] = 0

    @model_validator(mode="after")
    def _whole(self) -> TaskSpec:
        if (self.model is None) == (self.blocks is None):
            raise ValueError("give either model or blocks")
        if self.blocks is not None and (self.weights is not None or self.input is not None):
            raise ValueError("weights and input belong to a model, and this task has blocks")
        if self.model is None and self.activation_bytes < 0:
            raise ValueError("activation_bytes cannot be negative")
        if self.model is not None and self.activation_bytes:
            raise ValueError("activation_bytes belongs to blocks; a model's are measured")
        if (self.period is None) == (self.contract is None):
            raise ValueError("give either period or contract")
        if self.contract is not None and self.jitter:
            raise ValueError("jitter belongs to a period; a contract's burst says the same")
        if self.deadline is not None and self.deadline > self.interval:
            raise ValueError(
                "deadline is longer than the period; deadlines up to the period are supported, so that one job ends "
                "before the next comes"
                if self.contract is None or self.contract.burst == 1
                else "deadline is longer than burst times the contract's period; up to that is supported"
            )
        return self

    @property
    def step(self) -> int:
        """The period, of releases or of tokens, in microseconds."""
        if self.contract is not None:
            return self.contract.period
        assert self.period is not None
        return self.period

    @property
    def interval(self) -> int:
        """The longest deadline that is supported."""
        return self.step * (self.contract.burst if self.contract is not None else 1)

    @property
    def relative_deadline(self) -> int:
        """From release, in microseconds."""
        return self.deadline if self.deadline is not None else self.step

    @property
    def guaranteed(self) -> bool:
        """Whether its deadlines are promised."""
        return self.guarantee == "guaranteed"


def network_key(task: TaskSpec) -> tuple[str, str | None]:
    """What tasks that run one network have in common."""
    assert task.model is not None
    return task.model, task.weights


class TasksSpec(_Strict):
    """A set of tasks that share one budget."""

    budget: Annotated[
        Bytes,
        Field(
            description="For all tasks together, above the process's baseline; on a device, of the device's memory."
        ),
    ]
    device: Annotated[Device, Field(description="Where the networks run: cpu, cuda or cuda:N.")] = "cpu"
    host_budget: Annotated[
        Bytes | None,
        Field(
            description="On a device: pinned host memory from which weights are copied in; what does not fit there is "
            "read from storage each time. Left out: what the networks need, within half of what the host can spare."
        ),
    ] = None
    chunk: Annotated[
        Bytes | None,
        Field(
            description="On a device: its memory comes and goes in pieces of this size; the device's own if left out."
        ),
    ] = None
    policy: Annotated[Policy, Field(description="Earliest deadline first, or fixed priorities.")] = "edf"
    preemption: Annotated[
        Preemption,
        Field(description="At block boundaries, the preempted job keeping its block; or not at all, for less memory."),
    ] = "lp-keep"
    allocation: Annotated[
        str | None,
        Field(description="How memory is shared: optimal, swapnet, even, proportional, or package.module:function."),
    ] = None
    supply: SupplySpec = SupplySpec()
    storage: StorageSpec = StorageSpec()
    overhead: Annotated[Cost, Field(description="Of one block boundary, added to each segment.")] = 0
    margin: Annotated[float, Field(ge=1, le=10, description="Over the largest times measured.")] = 1.2
    calibration: Annotated[Span, Field(description="For how long each network is measured.")] = 8_000_000
    prefetch: Annotated[
        bool | None, Field(description="Load the likely next job's first block while the loader is idle.")
    ] = None
    compute_core: Annotated[int | None, Field(ge=0, description="Core to compute on.")] = None
    load_core: Annotated[int | None, Field(ge=0, description="Core to load on.")] = None
    tasks: Annotated[tuple[TaskSpec, ...], Field(min_length=1, max_length=256)]

    @model_validator(mode="after")
    def _names(self) -> TasksSpec:
        if self.budget <= 0:
            raise ValueError("budget must be more than zero")
        if self.device == "cpu" and self.host_budget is not None:
            raise ValueError(
                "host_budget belongs to a device with memory of its own: give device: cuda, or only budget"
            )
        if self.device == "cpu" and self.chunk is not None:
            raise ValueError("chunk belongs to a device with memory of its own: give device: cuda, or leave it out")
        if self.chunk == 0:
            raise ValueError("chunk must be more than zero")
        seen: set[str] = set()
        for task in self.tasks:
            if task.name in seen:
                raise ValueError(f"two tasks are named {task.name!r}; names must differ")
            seen.add(task.name)
        return self

    def plain(self) -> dict[str, Any]:
        """As it could be written in a file: what another process can read."""
        told: dict[str, Any] = _plain(self)
        return told


_TIMES = frozenset({"load", "compute", "period", "deadline", "jitter", "offset", "delay", "overhead", "calibration"})


def _plain(value: Any) -> Any:
    """Times as strings with their unit: numbers would be seconds."""
    if isinstance(value, BaseModel):
        shown = {name: getattr(value, name) for name in type(value).model_fields}
        return {n: f"{v}us" if n in _TIMES and v is not None else _plain(v) for n, v in shown.items() if v is not None}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def json_schema() -> dict[str, Any]:
    """The schema of ``tasks.yaml`` for editors (JSON Schema 2020-12)."""
    schema = TasksSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "narrowboat tasks"}
