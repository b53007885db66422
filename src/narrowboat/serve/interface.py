"""What the front rooms (protocols, page, metrics) know of the gateway behind them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from narrowboat.tasks.tensors import RawTensor, TensorSpec

State = Literal["starting", "serving", "restarting", "draining", "stopped"]


@dataclass(frozen=True)
class TaskFace:
    """A task as clients see it. Times in microseconds.

    Attributes:
        name: of the task.
        model: as the description names it.
        ready: it runs now; otherwise it is known and can be loaded.
        takes_requests: it has ``input: {queue: ...}``; the others take their inputs themselves.
        guaranteed: its deadlines are promised.
        inputs, outputs: tensors; empty while it is not known what they are.
        bound: on the response, by the analysis; None for best effort.
        deadline: relative.
        period: in which one request may come.
        burst: requests that may come at once.
        reason: why it is not ready; empty otherwise.
        facts: of its model, for the rooms that need more (``tokenizer`` folder, ``labels``, ``image`` mean and std).
    """

    name: str
    model: str
    ready: bool
    takes_requests: bool
    guaranteed: bool
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    bound: int | None = None
    deadline: int = 0
    period: int = 0
    burst: int = 1
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """The answer to one request. Times in microseconds.

    Attributes:
        outputs: in the order of the task's face; their bytes are the reply's own.
        admitted: the task's deadlines are promised.
        bound: on the response, by the analysis; None for best effort.
        deadline: that was kept or missed, from the request's release: the task's, or the client's own if sooner.
        response: from release to finish.
        met: the deadline was.
    """

    outputs: tuple[tuple[TensorSpec, RawTensor], ...]
    admitted: bool
    bound: int | None
    deadline: int
    response: int
    met: bool

    def parameters(self) -> dict[str, bool | int]:
        """What an answer carries beside its tensors."""
        told: dict[str, bool | int] = {
            "admitted": self.admitted,
            "deadline_us": self.deadline,
            "response_us": self.response,
            "met": self.met,
        }
        if self.bound is not None:
            told["bound_us"] = self.bound
        return told


class Feed(Protocol):
    """Events of one subscriber, bounded: one that is slow loses pictures, and is told how many."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Events as ``{"event": "hello" | "tick" | "plan" | "state", ...}``; the first is "hello"."""

    def close(self) -> None:
        """No more."""


class Gateway(Protocol):
    """Who stands between clients and the executor. Every method belongs to the event loop's thread.

    Attributes:
        state: only "serving" lets requests in.
        said: what it is at, or why it is not serving, in words.
    """

    state: State
    said: str

    def faces(self) -> Sequence[TaskFace]:
        """All tasks that run or could be loaded, by name."""

    def face(self, name: str) -> TaskFace:
        """One of them. Raises NoSuchTaskError."""

    async def infer(
        self, name: str, inputs: Mapping[str, RawTensor], *, timeout: int | None = None, priority: int = 0
    ) -> Reply:
        """One job.

        Args:
            name: of the task.
            inputs: by the names of its face.
            timeout: microseconds from now after which the answer is of no use.
            priority: among requests that are promised nothing, smaller first from 1; 0 is none.

        Raises:
            RequestError: one of its kinds, each with its HTTP status and gRPC code.
        """

    async def load(self, name: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask for admission of a task that is known, with other fields than its description has if they are given.

        Raises:
            ConflictError: refused, with the explanation. NoSuchTaskError, BadRequestError, NotServingError.
        """

    async def unload(self, name: str) -> dict[str, Any]:
        """Go on without a task. Raises as :meth:`load`."""

    async def set_budget(self, budget: int | str) -> dict[str, Any]:
        """Go on within other bytes; the new plan. Raises as :meth:`load`."""

    async def what_if(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What would be if: ``{"budget": ..., "add": [fields of a task, ...], "remove": [names]}``; changes nothing.

        Returns:
            ``{"admitted", "reasons", "suggestions", "plan", "change": {"pause_us", "allowed_us"} or None}``.

        Raises:
            BadRequestError: the question cannot be understood.
        """

    def plan(self) -> dict[str, Any]:
        """The plan in force: ``docs/serve.md``, "The plan"."""

    def feed(self) -> Feed:
        """Subscribe. Raises NotServingError: too many do."""

    def record(self, seconds: float) -> Any:
        """What happened in the last seconds, as a ``narrowboat.tasks.record.Record``."""
