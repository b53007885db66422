"""The jobs of one request, at the pace of the task's contract."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from narrowboat.errors import BeyondContractError, ExpiredError
from narrowboat.serve.interface import Gateway, Reply, TaskFace
from narrowboat.serve.openai.schema import Wish
from narrowboat.tasks.tensors import RawTensor

_LEAST = 0.001  # seconds between two tries


@dataclass(frozen=True)
class Limits:
    """What there is at most.

    Attributes:
        requests: of one task that are answered at once.
        wait: seconds that one job of a request under way waits for its turn.
        send: seconds in which a client has to take what it is sent.
    """

    requests: int = 8
    wait: float = 60.0
    send: float = 30.0


class Pace:
    """The turns of one task, among the requests that are under way.

    Args:
        limits: of them.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._under_way = 0
        self._last = 0.0

    @contextmanager
    def place(self, task: str) -> Iterator[None]:
        """One request more.

        Raises:
            BeyondContractError: there are too many already.
        """
        if self._under_way >= self._limits.requests:
            raise BeyondContractError(
                f"task {task!r} answers {self._under_way} requests, which are the most at once", retry_after=1.0
            )
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    def turn(self, now: float, wait: float, period: float) -> float:
        """When to try again, in seconds: those who were refused come one after another, a period apart."""
        self._last = max(now + max(wait, _LEAST), self._last + period)
        return self._last


class Jobs:
    """Asks for the jobs of one request, and remembers how they went.

    The first one is refused as the gateway refuses it; those that follow wait for their turn, so that a text that was
    begun is ended.

    Args:
        gateway: that runs them.
        face: of the task.
        pace: of the task.
        limits: of waiting.
        wish: of the client, for the first job.
    """

    def __init__(self, gateway: Gateway, face: TaskFace, pace: Pace, limits: Limits, wish: Wish) -> None:
        self._gateway, self._face, self._pace, self._limits, self._wish = gateway, face, pace, limits, wish
        self._begun = time.monotonic()
        self._done = self._missed = self._worst = self._deadline = 0
        self._admitted = True
        self._bound: int | None = face.bound

    async def run(self, inputs: Mapping[str, RawTensor]) -> Reply:
        """One job.

        Raises:
            RequestError: refused, expired or failed; BeyondContractError of a later one: it waited too long.
        """
        timeout = self._time_left()
        patience = time.monotonic() + self._limits.wait
        while True:
            try:
                reply = await self._gateway.infer(
                    self._face.name, inputs, timeout=timeout, priority=self._wish.priority
                )
                break
            except BeyondContractError as refused:
                if not self._done:
                    raise
                now, period = time.monotonic(), self._face.period / 1e6
                wait = period if refused.retry_after is None else refused.retry_after
                at = self._pace.turn(now, wait, period)
                if at > patience:
                    raise
                await asyncio.sleep(at - now)
        self._done += 1
        self._missed += not reply.met
        self._worst = max(self._worst, reply.response)
        self._deadline = max(self._deadline, reply.deadline)
        self._admitted = self._admitted and reply.admitted
        self._bound = reply.bound
        return reply

    def _time_left(self) -> int | None:
        if self._done or self._wish.timeout is None:
            return None
        left = self._wish.timeout - int((time.monotonic() - self._begun) * 1e6)
        if left <= 0:
            raise ExpiredError("the time that the request gave was over before its first job could begin")
        return left

    def told(self) -> dict[str, Any]:
        """How they went, for the answer. Times in microseconds."""
        return {
            "admitted": self._admitted,
            "bound_us": self._bound,
            "deadline_us": self._face.deadline or self._deadline,
            "worst_response_us": self._worst,
            "missed": self._missed,
            "jobs": self._done,
        }
