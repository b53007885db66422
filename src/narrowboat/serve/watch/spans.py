"""Spans of requests for OpenTelemetry, where that is installed and told where to send them; otherwise nothing.

``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``) says where: OTLP over HTTP, in batches, from a queue that
drops what is too much. Sampling, headers, timeouts and limits are OpenTelemetry's own settings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from narrowboat.errors import RequestError
from narrowboat.serve.interface import Reply

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_WHERE = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_QUEUE, _BATCH = 2048, 512  # spans: kept at most, and sent at once
_PARTS = 64  # spans below one request: a text may be a thousand jobs


class Span(Protocol):
    """One request while it is under way."""

    def event(self, name: str, **attributes: str | int | float | bool) -> None:
        """Something happened just now."""

    def named(self, task: str) -> None:
        """Which task it is for."""

    def received(self) -> None:
        """All of the request is here and understood."""

    def job(self, release: int, finish: int, start: int | None = None) -> None:
        """When the executor worked for it: Unix nanoseconds; ``start`` where it is known when its turn came."""

    def answered(self, reply: Reply) -> None:
        """What it is answered."""

    def failed(self, error: BaseException) -> None:
        """It is refused, or failed."""


class Tracer(Protocol):
    """Makes spans."""

    def request(self, task: str, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        """A span for as long as the context lasts, below the one that ``traceparent`` in the headers names."""

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""


class NoTracer:
    """Makes none. It is its own and only span."""

    def request(self, task: str, headers: Mapping[str, str]) -> NoTracer:
        """Itself."""
        return self

    def event(self, name: str, **attributes: str | int | float | bool) -> None:
        """Nothing, as all below."""

    def named(self, task: str) -> None:
        """Nothing."""

    def received(self) -> None:
        """Nothing."""

    def job(self, release: int, finish: int, start: int | None = None) -> None:
        """Nothing."""

    def answered(self, reply: Reply) -> None:
        """Nothing."""

    def failed(self, error: BaseException) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def __enter__(self) -> NoTracer:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def tracer_from(settings: Mapping[str, str] = os.environ, exporter: SpanExporter | None = None) -> Tracer:
    """The tracer that the environment asks for.

    Args:
        settings: the environment's variables.
        exporter: instead of OTLP over HTTP.

    Returns:
        :class:`NoTracer` unless it is known where to send spans and ``opentelemetry-sdk`` is installed.
    """
    off = settings.get("OTEL_SDK_DISABLED", "").lower() == "true" or settings.get("OTEL_TRACES_EXPORTER") == "none"
    if off or (exporter is None and not any(settings.get(name) for name in _WHERE)):
        return NoTracer()
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ImportError:
        return NoTracer()
    name = settings.get("OTEL_SERVICE_NAME") or "narrowboat"
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUE, max_export_batch_size=_BATCH))
    return OtelTracer(provider)


class OtelTracer:
    """Spans of OpenTelemetry.

    Args:
        provider: who takes them.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("narrowboat.serve")

    def request(self, task: str, headers: Mapping[str, str]) -> OtelSpan:
        """See :class:`Tracer`."""
        return OtelSpan(self._tracer, task, headers)

    def close(self) -> None:
        """See :class:`Tracer`."""
        self._provider.force_flush(3_000)
        self._provider.shutdown()


class OtelSpan:
    """A request's span and those below it: receive, wait in queue, execute, send.

    What lies below is written when the request has ended, with the times at which things happened.
    """

    def __init__(self, tracer: Any, task: str, headers: Mapping[str, str]) -> None:
        self._tracer, self._task, self._headers = tracer, task, headers
        self._parts: list[tuple[str, int, int]] = []
        self._received: int | None = None
        self._answered: int | None = None
        self._jobs = 0

    def __enter__(self) -> OtelSpan:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        above = TraceContextTextMapPropagator().extract(self._headers)
        self._begun = time.time_ns()
        self._span = self._tracer.start_span("request", above, SpanKind.SERVER, start_time=self._begun)
        if self._task:
            self.named(self._task)
        return self

    def event(self, name: str, **attributes: str | int | float | bool) -> None:
        """See :class:`Span`."""
        self._span.add_event(name, attributes)

    def named(self, task: str) -> None:
        """See :class:`Span`."""
        self._task = task
        self._span.update_name(f"infer {task}")
        self._span.set_attribute("narrowboat.task", task)

    def received(self) -> None:
        """See :class:`Span`."""
        if self._received is None:
            self._received = time.time_ns()
            self._parts.append(("receive", self._begun, self._received))

    def job(self, release: int, finish: int, start: int | None = None) -> None:
        """See :class:`Span`."""
        self._jobs += 1
        if len(self._parts) >= _PARTS:
            return
        if start is not None:
            self._parts.append(("wait in queue", release, start))
        self._parts.append(("execute", release if start is None else start, finish))

    def answered(self, reply: Reply) -> None:
        """See :class:`Span`."""
        self._answered = time.time_ns()
        told = {f"narrowboat.{key}": value for key, value in reply.parameters().items()}
        self._span.set_attributes({**told, "narrowboat.outcome": "done" if reply.met else "late"})

    def failed(self, error: BaseException) -> None:
        """See :class:`Span`."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes({"narrowboat.outcome": type(error).__name__, "error.type": type(error).__name__})
        if isinstance(error, RequestError):
            self._span.set_attribute("http.response.status_code", error.status)
        self._span.set_status(Status(StatusCode.ERROR, str(error)[:300]))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        from opentelemetry.trace import set_span_in_context

        if error is not None:
            self.failed(error)
        ended = time.time_ns()
        self._span.set_attribute("narrowboat.jobs", self._jobs)
        if self._answered is not None:
            self._parts.append(("send", self._answered, ended))
        here = set_span_in_context(self._span)
        for name, begin, end in self._parts:
            self._tracer.start_span(name, here, start_time=begin).end(max(begin, end))
        self._span.end(ended)
