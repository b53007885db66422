"""What scrapers, browsers and people get; and that every request is seen once, whatever becomes of it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from narrowboat.errors import NoSuchTaskError, RequestError
from narrowboat.serve.interface import Reply
from narrowboat.serve.watch.observe import Observe, protocol_of
from narrowboat.serve.watch.observe_grpc import ObserveGrpc
from narrowboat.serve.watch.routes import router
from narrowboat.serve.watch.spans import NoTracer
from narrowboat.serve.watch.watch import Watch
from narrowboat.tasks.record import Record
from serve_kit import FakeGateway
from serve_watch_kit import job, plan, setup, tick


class WatchedGateway(FakeGateway):
    """A fake that tells its watch, as the real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.watch = Watch(tracer=NoTracer())

    def record(self, seconds: float) -> Record:
        return self.watch.record(seconds)

    async def infer(self, name: str, inputs: Any, *, timeout: int | None = None, priority: int = 0) -> Reply:
        with self.watch.infer(name) as seen:
            reply = await super().infer(name, inputs, timeout=timeout, priority=priority)
            seen.answered(reply)
            return reply


@pytest.fixture
def gateway() -> WatchedGateway:
    made = WatchedGateway()
    told = setup("camera", "identity")
    made.watch.state("serving")
    made.watch.plan(plan(told), told)
    made.watch.granted({"lost": []})
    return made


@pytest.fixture
def client(gateway: WatchedGateway) -> TestClient:
    app = FastAPI()
    app.include_router(router(gateway))

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse({"error": str(error)}, error.status)

    @app.post("/v2/models/{name}/infer")
    async def infer(name: str) -> Response:
        await gateway.infer(name, {})
        return Response()

    app.add_middleware(Observe, watch=gateway.watch)
    return TestClient(app, raise_server_exceptions=False)


def count(gateway: WatchedGateway, **labels: str) -> float | None:
    found: float | None = gateway.watch.metrics.registry.get_sample_value("narrowboat_requests_total", labels)
    return found


def test_a_scraper_gets_the_format_that_it_asks_for(client: TestClient, gateway: WatchedGateway) -> None:
    gateway.watch.tick(tick(100_000, [job("camera", 0, 1_000)]))
    plain = client.get("/metrics")
    assert plain.status_code == 200 and plain.headers["content-type"].startswith("text/plain; version=")
    assert "narrowboat_guarantee_valid 1.0" in plain.text
    assert 'narrowboat_response_seconds_count{task="camera"} 1.0' in plain.text
    other = client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0, text/plain;q=0.5"})
    assert other.headers["content-type"].startswith("application/openmetrics-text")


def test_a_trace_is_a_file_that_is_read_back(client: TestClient, gateway: WatchedGateway, tmp_path: Path) -> None:
    for number in range(100):
        release = number * 100_000
        gateway.watch.tick(tick(release + 50_000, [job("camera", number, release)]))
    got = client.get("/v1/trace", params={"seconds": 2})
    assert got.headers["content-disposition"] == 'attachment; filename="narrowboat-trace.json"'
    (tmp_path / "trace.json").write_bytes(got.content)
    record = Record.load(tmp_path / "trace.json")
    assert 19 <= len(record.jobs) <= 21
    assert {event["ph"] for event in got.json()["traceEvents"]} >= {"M", "X", "C"}
    assert len(client.get("/v1/trace").json()["jobs"]) > 90
    assert client.get("/v1/trace", params={"run": "before"}).status_code == 404
    gateway.watch.restarted()
    assert len(client.get("/v1/trace", params={"run": "before"}).json()["jobs"]) > 90


@pytest.mark.parametrize("query", ["seconds=x", "seconds=0", "seconds=-1", "seconds=nan", "seconds=1e9", "run=other"])
def test_a_trace_of_nonsense_is_a_bad_request(client: TestClient, query: str) -> None:
    assert client.get(f"/v1/trace?{query}").status_code == 400


def test_before_anything_ran_there_is_no_trace() -> None:
    app = FastAPI()
    bare = FakeGateway()
    bare.record = lambda seconds: Record()  # type: ignore[method-assign]
    app.include_router(router(bare))
    with pytest.raises(RequestError, match="nothing has run"):
        TestClient(app).get("/v1/trace")
    assert TestClient(app).get("/metrics").status_code == 200


def test_the_guarantee_says_what_broke_it(client: TestClient, gateway: WatchedGateway) -> None:
    told = client.get("/v1/guarantee").json()
    assert told["valid"] and told["broken"] == [] and told["state"] == "serving"
    gateway.watch.tick(tick(100_000, [job("camera", 5, 1_000, 40_000, outcome="late", cause="over its deadline")]))
    told = client.get("/v1/guarantee").json()
    assert not told["valid"] and [each["premise"] for each in told["broken"]] == ["deadlines", "bounds"]
    assert {"premise", "means", "said", "since", "last", "count"} == set(told["broken"][0])


def test_every_request_is_counted_once(client: TestClient, gateway: WatchedGateway) -> None:
    gateway._faces["identity"] = gateway._faces["identity"].__class__(
        "identity", "zoo:identity", ready=True, takes_requests=True, guaranteed=True
    )
    gateway.fail("identity", NoSuchTaskError("gone"))
    assert client.post("/v2/models/identity/infer").status_code == 404
    assert client.post("/v2/models/identity/infer").status_code == 200
    assert client.post("/v2/models/nobody/infer").status_code == 404
    assert client.get("/nowhere").status_code == 404
    assert count(gateway, protocol="oip-http", task="identity", code="404") == 1
    assert count(gateway, protocol="oip-http", task="identity", code="200") == 1
    assert count(gateway, protocol="oip-http", task="", code="404") == 1
    assert count(gateway, protocol="http", task="", code="404") == 1
    value = gateway.watch.metrics.registry.get_sample_value
    assert value("narrowboat_gateway_overhead_seconds_count") == 1
    assert value("narrowboat_requests_in_flight") == 0


def test_a_fault_of_our_own_counts_as_one(gateway: WatchedGateway) -> None:
    with pytest.raises(ZeroDivisionError), gateway.watch.request("openai", {}):
        raise ZeroDivisionError
    assert count(gateway, protocol="openai", task="", code="500") == 1


def test_a_client_that_goes_counts_as_gone(gateway: WatchedGateway) -> None:
    async def go() -> None:
        gateway.delay("identity", 30)

        async def ask() -> None:
            with gateway.watch.request("oip-http", {}):
                await gateway.infer("identity", {"x": _zeros()})

        asking = asyncio.create_task(ask())
        while not gateway.running:
            await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(go())
    assert count(gateway, protocol="oip-http", task="identity", code="499") == 1
    assert gateway.watch.metrics.registry.get_sample_value("narrowboat_requests_in_flight") == 0


def _zeros() -> Any:
    from serve_kit import raw

    return raw("FP32", [[0.0] * 8])


@pytest.mark.parametrize("read_by_hand", [False, True])
def test_calls_of_grpc_are_seen_with_the_same_codes(gateway: WatchedGateway, read_by_hand: bool) -> None:
    async def call() -> None:
        async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            if request == b"refuse":
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too soon")
            with gateway.watch.infer("identity") as seen:
                seen.answered(Reply((), admitted=True, bound=None, deadline=1, response=0, met=True))
            return request

        async def answer_read(sent: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
            return await answer(await anext(aiter(sent)), context)

        handlers = {"Echo": grpc.unary_unary_rpc_method_handler(answer)}
        if read_by_hand:  # as serve_grpc has it
            handlers = {"Echo": grpc.stream_unary_rpc_method_handler(answer_read)}
        server = grpc.aio.server(interceptors=[ObserveGrpc(gateway.watch)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            echo = channel.unary_unary("/test.Test/Echo")
            assert await echo(b"hello", timeout=20) == b"hello"
            with pytest.raises(grpc.aio.AioRpcError, match="too soon"):
                await echo(b"refuse", timeout=20)
        await server.stop(None)

    asyncio.run(call())
    assert count(gateway, protocol="grpc", task="identity", code="200") == 1
    assert count(gateway, protocol="grpc", task="", code="429") == 1


@pytest.mark.parametrize(
    ("path", "protocol"),
    [
        ("/v2", "oip-http"),
        ("/v2/models/x/infer", "oip-http"),
        ("/v1/chat/completions", "openai"),
        ("/v1/models", "openai"),
        ("/v1/plan", "http"),
        ("/", "http"),
    ],
)
def test_a_protocol_goes_by_its_path(path: str, protocol: str) -> None:
    assert protocol_of(path) == protocol


def test_watching_never_imports_torch() -> None:
    code = (
        "import sys, narrowboat.serve.watch.routes, narrowboat.serve.watch.observe; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
