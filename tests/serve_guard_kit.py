"""Real sockets for the tests of the door and the server: a gateway with a life, small rooms, raw clients.

async with serving(limits=Limits(header_seconds=0.2)) as served:     # on 127.0.0.1, port chosen by the kernel
    answer = await exchange(served.port, b"GET /v2/health/live HTTP/1.1\r\nHost: localhost:%d\r\n\r\n")
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from narrowboat.errors import BeyondContractError, NarrowboatError
from narrowboat.serve import logs
from narrowboat.serve.errors_http import install
from narrowboat.serve.interface import Gateway
from narrowboat.serve.schema import publish
from narrowboat.serve.server import Addresses, Server
from narrowboat.serve.settings import Limits, ServeSettings
from serve_kit import FakeGateway

LONG = 20.0  # seconds after which a test that waits has failed


class LivingGateway(FakeGateway):
    """A fake one that can be started, drained and closed; ``calls`` says what was asked of it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.state = "starting"
        self.calls: list[str] = []
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.start_error: NarrowboatError | None = None
        self.reload_error: Exception | None = None
        self.slow_entered = asyncio.Event()
        self.slow_may_end = asyncio.Event()

    async def start(self) -> None:
        """As soon as it may."""
        self.calls.append("start")
        await self.may_start.wait()
        if self.start_error is not None:
            raise self.start_error
        self.set_state("serving")

    async def drain(self, seconds: float) -> None:
        """At once."""
        self.calls.append("drain")
        self.set_state("draining")

    async def close(self) -> None:
        """At once."""
        self.calls.append("close")

    async def reload(self) -> None:
        """What a test wants."""
        self.calls.append("reload")
        if self.reload_error is not None:
            raise self.reload_error


def small_rooms(gateway: Gateway, settings: ServeSettings) -> FastAPI:
    """A few paths whose rights the table knows."""
    assert isinstance(gateway, LivingGateway)
    app = FastAPI(title="small", docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.get("/v2/health/live")
    async def live() -> Response:
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        serving = gateway.state == "serving"
        return JSONResponse({"ready": serving}, 200 if serving else 503)

    @app.get("/")
    async def shell() -> Response:
        return Response("<!doctype html>", media_type="text/html", headers={"cache-control": "no-cache"})

    @app.post("/v2/models/{model}/infer")
    async def infer(model: str, request: Request) -> Response:
        body = await request.body()
        return JSONResponse({"model": gateway.face(model).name, "bytes": len(body)})

    @app.get("/v1/plan")
    async def plan() -> Response:
        return JSONResponse({"plan": True})

    @app.put("/v1/budget")
    async def budget(slow: bool = False) -> Response:
        if slow:
            gateway.slow_entered.set()
            await gateway.slow_may_end.wait()
        gateway.calls.append("budget")
        return JSONResponse({"budget": True})

    @app.post("/v2/repository/models/{model}/load")
    async def load(model: str) -> Response:
        gateway.calls.append("load")
        return JSONResponse(await gateway.load(model))

    @app.post("/v2/models/{model}/slow")
    async def slow(model: str) -> Response:
        gateway.running += 1
        gateway.slow_entered.set()
        try:
            await gateway.slow_may_end.wait()
        except asyncio.CancelledError:
            gateway.cancelled += 1
            raise
        finally:
            gateway.running -= 1
        return JSONResponse({"slow": True})

    @app.get("/v1/events")
    async def events() -> Response:
        feed = gateway.feed()

        async def lines() -> AsyncIterator[bytes]:
            try:
                async for event in feed:
                    yield b"data: " + json.dumps(event["event"]).encode() + b"\n\n"
            finally:
                feed.close()

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get("/v1/large")
    async def large() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(400):
                yield bytes(1 << 18)

        return StreamingResponse(pieces())

    @app.get("/v1/broken")
    async def broken() -> Response:
        raise RuntimeError("a secret detail")

    @app.get("/v1/number")
    async def number(value: int) -> Response:
        return JSONResponse(value)

    @app.get("/v1/models")
    async def models() -> Response:
        raise BeyondContractError("too soon", retry_after=1.2, details={"task": "x"})

    install(app)
    publish(app)
    return app


@dataclass
class Served:
    """A server that runs on this loop."""

    server: Server
    gateway: LivingGateway
    addresses: list[Addresses] = field(default_factory=list)
    task: asyncio.Task[bool] | None = None

    @property
    def port(self) -> int:
        """Of HTTP."""
        return int(self.server.addresses.http.rsplit(":", 1)[1])

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self.server.state.connections)

    def ended(self) -> asyncio.Task[bool]:
        """The task in which it runs."""
        assert self.task is not None
        return self.task


@contextlib.asynccontextmanager
async def serving(
    *,
    limits: Limits | None = None,
    wait: bool = True,
    prepare: Callable[[LivingGateway], None] | None = None,
    rooms: Callable[[Gateway, ServeSettings], FastAPI] = small_rooms,
    **settings: Any,
) -> AsyncIterator[Served]:
    """A server without gRPC, from before its start to after its end.

    Args:
        limits: of it.
        wait: until requests are let in.
        prepare: is called with the gateway before it starts.
        rooms: behind the door.
        settings: others.
    """
    gateway = LivingGateway()
    if prepare is not None:
        prepare(gateway)
    chosen = ServeSettings(
        **{"tasks": Path("tasks.yaml"), "port": 0, "grpc_port": None, "drain_seconds": 5.0, **settings},
        limits=limits or Limits(),
    )
    served = Served(Server(chosen, lambda _settings, _tell: gateway, lambda said: None, rooms), gateway)
    served.task = asyncio.create_task(served.server.run(served.addresses.append))
    try:
        async with asyncio.timeout(LONG):
            while (wait and not served.addresses) or served.server._listener is None:
                if served.task.done():
                    await served.task
                await asyncio.sleep(0.002)
        yield served
    finally:
        if not served.task.done():
            served.server.end()
            served.server.end()
        async with asyncio.timeout(LONG):
            await asyncio.gather(served.task, return_exceptions=True)


def on_a_loop(main: Coroutine[Any, Any, None]) -> None:
    """Run a test as the server does: on uvloop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main, 60))


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """Of the body."""
        return json.loads(self.body)


def request(
    method: str, path: str, port: int, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> bytes:
    """An HTTP/1.1 request as a well-behaved client writes it; ``headers`` replace its own."""
    usual = {"Host": f"127.0.0.1:{port}"}
    if body is not None:
        usual["Content-Length"] = str(len(body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in {**usual, **(headers or {})}.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + (body or b"")


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """One answer, whose end is known by its length or by chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}
    body = b""
    if headers.get("transfer-encoding") == "chunked":
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answer(int(first.split()[1]), headers, body)


async def exchange(port: int, sent: bytes, *, tls: Any = None) -> Answer:
    """Send bytes on a connection of their own, and read one answer."""
    async with asyncio.timeout(LONG):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        try:
            writer.write(sent)
            return await read_answer(reader)
        finally:
            writer.close()


async def ask(
    port: int, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None, **how: Any
) -> Answer:
    """:func:`request`, sent by :func:`exchange`."""
    return await exchange(port, request(method, path, port, headers, body), **how)


async def until(happened: Callable[[], bool]) -> None:
    """Wait for what has to happen soon."""
    async with asyncio.timeout(LONG):
        while not happened():
            await asyncio.sleep(0.005)


def descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


def make_certificate(folder: Path, name: str = "server", *extra: str) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key, by the openssl command."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate), *(extra or ("-days", "2"))),
        ],
        check=True,
        capture_output=True,
    )
    key.chmod(0o600)
    return certificate, key


@contextlib.contextmanager
def logged(level: str = "info") -> Iterator[io.StringIO]:
    """What the log says while this lasts, in place of stderr."""
    names = ["narrowboat.serve", *logs._FOREIGN]
    loggers = [logging.getLogger(name) for name in names]
    kept = [(logger, list(logger.handlers), logger.propagate, logger.level) for logger in loggers]
    text = io.StringIO()
    logs.set_up(level, text)
    try:
        yield text
    finally:
        for logger, handlers, propagate, number in kept:
            logger.handlers[:] = handlers
            logger.propagate = propagate
            logger.setLevel(number)


def log_lines(text: str) -> list[dict[str, Any]]:
    """What the log says, line by line."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


if __name__ == "__main__":  # a server in a process of its own: python serve_guard_kit.py
    logs.set_up()

    async def main() -> bool:
        """Serve small rooms until told to end."""
        gateway = LivingGateway()
        settings = ServeSettings(
            Path("tasks.yaml"), port=0, grpc_port=None, drain_seconds=float(sys.argv[1]), access_log=True
        )
        server = Server(settings, lambda _settings, _tell: gateway, lambda said: None, small_rooms)
        ended = await server.run(lambda addresses: print(addresses.http, flush=True))
        print(" ".join(gateway.calls), flush=True)
        return ended

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(0 if runner.run(main()) else 1)
