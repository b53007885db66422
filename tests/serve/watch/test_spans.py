"""One trace per request, below the client's; nothing at all where OpenTelemetry is off."""

from __future__ import annotations

import subprocess
import sys
import time
import timeit

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from narrowboat.errors import BeyondContractError
from narrowboat.serve.interface import Reply
from narrowboat.serve.watch.spans import NoTracer, OtelTracer, tracer_from
from narrowboat.serve.watch.watch import Watch

TRACE = "0af7651916cd43dd8448eb211c80319c"
HEADERS = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
REPLY = Reply((), admitted=True, bound=10_000, deadline=20_000, response=4_000, met=True)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> OtelTracer:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return OtelTracer(provider)


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_a_span_with_its_stations_below_it(tracer: OtelTracer, exporter: InMemorySpanExporter) -> None:
    now = time.time_ns()
    with tracer.request("detector", HEADERS) as span:
        span.received()
        span.event("let in", waiting=2)
        span.answered(REPLY)
        span.job(now, now + 4_000_000, now + 1_000_000)
    spans = by_name(exporter)
    assert set(spans) == {"infer detector", "receive", "wait in queue", "execute", "send"}
    whole = spans["infer detector"]
    assert whole.parent is not None and f"{whole.parent.trace_id:032x}" == TRACE
    assert all(s.parent.span_id == whole.context.span_id for s in spans.values() if s is not whole and s.parent)
    assert whole.attributes is not None
    assert whole.attributes["narrowboat.task"] == "detector"
    assert whole.attributes["narrowboat.outcome"] == "done"
    assert whole.attributes["narrowboat.bound_us"] == 10_000
    assert whole.attributes["narrowboat.response_us"] == 4_000
    assert whole.attributes["narrowboat.deadline_us"] == 20_000
    assert [event.name for event in whole.events] == ["let in"]
    execute = spans["execute"]
    assert (execute.start_time, execute.end_time) == (now + 1_000_000, now + 4_000_000)
    assert spans["wait in queue"].end_time == execute.start_time


def test_a_refusal_is_an_error_with_its_kind(tracer: OtelTracer, exporter: InMemorySpanExporter) -> None:
    with pytest.raises(BeyondContractError), tracer.request("detector", {}):
        raise BeyondContractError("too soon", retry_after=1)
    (span,) = exporter.get_finished_spans()
    assert not span.status.is_ok and span.status.description == "too soon"
    assert span.attributes is not None
    assert span.attributes["narrowboat.outcome"] == "BeyondContractError"
    assert span.attributes["http.response.status_code"] == 429


@pytest.mark.parametrize("headers", [{}, {"traceparent": "rubbish"}, {"traceparent": "00-0-0-00" * 500}])
def test_without_a_proper_parent_a_trace_begins_here(
    tracer: OtelTracer, exporter: InMemorySpanExporter, headers: dict[str, str]
) -> None:
    with tracer.request("detector", headers):
        pass
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_the_watch_puts_request_and_job_together(tracer: OtelTracer, exporter: InMemorySpanExporter) -> None:
    watch = Watch(tracer=tracer)
    with watch.request("oip-http", HEADERS), watch.infer("detector") as seen:
        seen.answered(REPLY, start=1_000)
    spans = by_name(exporter)
    assert set(spans) == {"infer detector", "receive", "wait in queue", "execute", "send"}
    queue = spans["wait in queue"]
    assert queue.end_time is not None and queue.start_time is not None
    assert queue.end_time - queue.start_time == 1_000_000


def test_a_text_of_many_jobs_has_some_spans_and_their_number(
    tracer: OtelTracer, exporter: InMemorySpanExporter
) -> None:
    watch = Watch(tracer=tracer)
    with watch.request("openai", {}) as whole:
        for _ in range(1_000):
            with watch.infer("detector") as seen:
                seen.answered(REPLY, start=1)
    assert whole.jobs == 1_000 and whole.overhead is None
    assert len(exporter.get_finished_spans()) <= 68
    attributes = by_name(exporter)["infer detector"].attributes
    assert attributes is not None and attributes["narrowboat.jobs"] == 1_000


def test_it_is_off_unless_it_is_told_where_to_send() -> None:
    assert isinstance(tracer_from({}), NoTracer)
    there = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert isinstance(tracer_from({**there, "OTEL_SDK_DISABLED": "true"}), NoTracer)
    assert isinstance(tracer_from({**there, "OTEL_TRACES_EXPORTER": "none"}), NoTracer)


def test_told_where_it_sends_in_batches_and_closes(exporter: InMemorySpanExporter) -> None:
    tracer = tracer_from({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, exporter)
    assert isinstance(tracer, OtelTracer)
    for _ in range(10):
        with tracer.request("detector", {}):
            pass
    tracer.close()
    assert len(exporter.get_finished_spans()) == 10


def test_without_the_packages_it_is_off() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from narrowboat.serve.watch.spans import NoTracer, tracer_from\n"
        "made = tracer_from({'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://127.0.0.1:9'})\n"
        "sys.exit(not isinstance(made, NoTracer))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_off_it_costs_next_to_nothing() -> None:
    tracer = tracer_from({})

    def one() -> None:
        with tracer.request("detector", HEADERS) as span:
            span.event("let in")

    assert min(timeit.repeat(one, number=2_000, repeat=7)) / 2_000 < 2e-6
