"""All that watches, in one: whoever runs the gateway tells it what happens, and the routes ask it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from narrowboat.errors import RequestError
from narrowboat.serve.interface import Reply
from narrowboat.serve.watch.metrics import Metrics
from narrowboat.serve.watch.premises import Premises
from narrowboat.serve.watch.spans import Span, Tracer, tracer_from
from narrowboat.serve.watch.window import Window
from narrowboat.tasks.record import Record

_CURRENT: ContextVar[Seen | None] = ContextVar("narrowboat_request", default=None)
_CLOSED = 499  # what a request counts as whose client has gone


class Seen:
    """One request as it is seen.

    Attributes:
        protocol: over which it came.
        span: of it.
        task: "" until it is known.
        code: of HTTP; what it was answered, or 0.
        reply: of the task, if there is one; the last, if it took several jobs.
        jobs: that have answered.
    """

    __slots__ = ("_began", "code", "jobs", "protocol", "reply", "span", "task")

    def __init__(self, protocol: str, span: Span) -> None:
        self.protocol, self.span = protocol, span
        self.task, self.code, self.jobs = "", 0, 0
        self.reply: Reply | None = None
        self._began = time.perf_counter_ns()

    def answered(self, reply: Reply, start: int | None = None) -> None:
        """The task has answered, just now.

        Args:
            reply: that it gave.
            start: microseconds from its release until its turn came, if that is known.
        """
        self.reply = reply
        self.jobs += 1
        self.span.answered(reply)
        now = time.time_ns()
        release = now - reply.response * 1000
        self.span.job(release, now, None if start is None else release + start * 1000)

    @property
    def overhead(self) -> float | None:
        """Seconds in the gateway beside the executor's response; None unless the request was one job."""
        if self.reply is None or self.jobs != 1:
            return None
        return max((time.perf_counter_ns() - self._began) / 1e9 - self.reply.response / 1e6, 0.0)


class Watch:
    """The gateway's watch. Everything belongs to the event loop's thread.

    Args:
        seconds, most: of the window: see :class:`Window`.
        tracer: of spans; as the environment says if left out.
    """

    def __init__(self, seconds: float = 60.0, most: int = 50_000, tracer: Tracer | None = None) -> None:
        self.window = Window(seconds, most)
        self.premises = Premises()
        self.metrics = Metrics(self.premises)
        self.tracer = tracer if tracer is not None else tracer_from()

    # -- told by the gateway ---------------------------------------------------------------------------

    def tick(self, event: Mapping[str, Any]) -> None:
        """One tick of the feed: all of them, and each once."""
        self.window.tick(event)
        self.premises.tick(event)
        self.metrics.tick(event)

    def plan(self, plan: Mapping[str, Any], setup: Mapping[str, Any], **change: int) -> None:
        """Another plan is in force; see :meth:`Window.plan` for what may be told of the change."""
        self.window.plan(plan, setup, **change)
        self.premises.plan(plan, setup)
        self.metrics.plan(plan)

    def granted(self, real_time: Mapping[str, Any]) -> None:
        """``real_time`` of the executor's "started"."""
        self.window.granted(real_time)
        self.premises.granted(real_time)

    def restarted(self) -> None:
        """The executor was lost: the ticks that follow are another process's."""
        self.window.restarted()
        self.premises.restarted()
        self.metrics.restarted()

    def state(self, state: str, said: str = "") -> None:
        """Of the gateway."""
        self.premises.state(state, said)
        self.metrics.state(state)

    def record(self, seconds: float) -> Record:
        """What happened in the last seconds."""
        return self.window.record(seconds)

    def close(self) -> None:
        """Send the spans that are left; waits a few seconds at most."""
        self.tracer.close()

    # -- around requests -------------------------------------------------------------------------------

    @contextmanager
    def request(self, protocol: str, headers: Mapping[str, str]) -> Iterator[Seen]:
        """Around a whole request, from its first byte to its answer's last; counts it once it has its answer.

        Args:
            protocol: one of ``metrics.PROTOCOLS``.
            headers: or gRPC's metadata, by lower-case names.
        """
        with self.tracer.request("", headers) as span:
            seen = Seen(protocol, span)
            token = _CURRENT.set(seen)
            try:
                yield seen
            except BaseException as error:
                seen.code = seen.code or _code(error)
                raise
            finally:
                _CURRENT.reset(token)
                self.metrics.answered(protocol, seen.task, seen.code or 200, seen.overhead)

    @contextmanager
    def infer(self, task: str) -> Iterator[Seen]:
        """Around one job's way through the gateway; ``.answered(reply)`` is told of the reply.

        The request that it belongs to is the one around it. Without one it is a request by itself.
        """
        around = _CURRENT.get()
        if around is None:
            with self.request("grpc", {}), self.infer(task) as seen:
                yield seen
            return
        around.task = task
        around.span.named(task)
        around.span.received()
        self.metrics.begun()
        try:
            yield around
        except BaseException as error:
            around.code = _code(error)
            around.span.failed(error)
            raise
        finally:
            self.metrics.ended()


def _code(error: BaseException) -> int:
    if isinstance(error, RequestError):
        return error.status
    return 500 if isinstance(error, Exception) else _CLOSED
