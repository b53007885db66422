"""Connections: nobody holds one for longer than it takes, and what is not HTTP/1.1 ends cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import time
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from narrowboat.serve.guard.connections import GuardedProtocol
from narrowboat.serve.settings import Limits
from serve_guard_kit import (
    LONG,
    Served,
    ask,
    descriptors,
    exchange,
    logged,
    on_a_loop,
    read_answer,
    request,
    serving,
    until,
)

QUICK = Limits(header_seconds=0.2, body_seconds=0.3, write_seconds=0.3, idle_seconds=0.2)
INFER = "/v2/models/identity/infer"


async def open_to(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", served.port)


async def read_to_the_end(reader: asyncio.StreamReader) -> bytes:
    """What comes until the other side closes, or resets."""
    got = b""
    async with asyncio.timeout(LONG):
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 16):
                got += piece
    return got


def test_header_fields_that_come_slowly_end_the_connection() -> None:
    async def main() -> None:
        async with serving(limits=QUICK) as served:
            reader, writer = await open_to(served)
            began = time.monotonic()
            # A byte now and then does not put it off.
            with contextlib.suppress(ConnectionError):
                for byte in request("GET", "/v2/health/live", served.port)[:40]:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.02)
            got = await read_to_the_end(reader)
            assert got.startswith(b"HTTP/1.1 408 ") and b"RequestTimeoutError" in got
            assert time.monotonic() - began < 3
            writer.close()
            await until(lambda: served.connections == 0)

    on_a_loop(main())


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n\r\n\r\n"])
def test_half_a_request_is_closed(sent: bytes) -> None:
    async def main() -> None:
        async with serving(limits=QUICK) as served:
            reader, writer = await open_to(served)
            writer.write(sent)
            got = await read_to_the_end(reader)
            assert got == b"" if not sent else got.startswith(b"HTTP/1.1 408 ")
            writer.close()
            await until(lambda: served.connections == 0)

    on_a_loop(main())


def test_empty_lines_without_end_are_closed() -> None:
    async def main() -> None:
        async with serving(limits=QUICK) as served:
            reader, writer = await open_to(served)
            writer.write(request("GET", "/v2/health/live", served.port))
            assert (await read_answer(reader)).status == 200
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - began < 3 and served.connections:
                    writer.write(b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.02)
            assert time.monotonic() - began < 2.5
            writer.close()

    on_a_loop(main())


def test_a_body_that_comes_slowly_ends_the_connection_and_its_request() -> None:
    async def main() -> None:
        async with serving(limits=QUICK) as served:
            reader, writer = await open_to(served)
            writer.write(request("POST", INFER, served.port, {"Content-Length": "1000"}, b"only a part"))
            got = await read_to_the_end(reader)
            assert got.startswith(b"HTTP/1.1 408 ") and b"the body did not come whole" in got
            writer.close()
            await until(lambda: served.connections == 0 and not served.server.state.tasks)
            assert served.server.app.door.meter.active == 0

    on_a_loop(main())


def test_an_idle_connection_is_closed_after_its_own_time() -> None:
    async def main() -> None:
        async with serving(limits=QUICK) as served:
            reader, writer = await open_to(served)
            writer.write(request("GET", "/v2/health/live", served.port))
            assert (await read_answer(reader)).status == 200
            assert await read_to_the_end(reader) == b""
            writer.close()
            await until(lambda: served.connections == 0)

    on_a_loop(main())


def test_an_answer_that_takes_long_is_not_timed_out() -> None:
    async def main() -> None:
        async with serving(limits=QUICK) as served:
            reader, writer = await open_to(served)
            writer.write(request("POST", "/v2/models/identity/slow", served.port, body=b""))
            await asyncio.sleep(0.6)
            served.gateway.slow_may_end.set()
            assert (await read_answer(reader)).status == 200
            writer.close()

    on_a_loop(main())


@pytest.mark.parametrize("path", ["/v1/large", "/v1/events"])
def test_an_answer_to_a_client_that_does_not_read_is_dropped(path: str) -> None:
    async def main() -> None:
        async with serving(limits=QUICK) as served:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", served.port))
            client.sendall(request("GET", path, served.port))
            await until(lambda: served.connections == 1)

            def push() -> bool:
                for _ in range(20):  # events are small: many of them fill the buffers
                    served.gateway.push({"event": "x" * 60_000})
                return served.connections == 0

            await until(push)
            await until(lambda: not served.server.state.tasks)
            assert not served.gateway.feeds
            client.close()

    on_a_loop(main())


class Stuck(asyncio.Transport):
    """To a client that reads nothing: what is written stays, so that closing does not come to an end."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closing, self.aborted = b"", False, False

    def get_extra_info(self, name: str, default: object = None) -> object:
        return default

    def write(self, data: bytes) -> None:  # type: ignore[override]
        self.written += data

    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_small_answer_that_is_never_read_does_not_keep_the_connection(connection: str) -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def main() -> None:
        config = uvicorn.Config(
            answer,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            interface="asgi3",
            timeout_keep_alive=0,
        )
        config.load()
        state, transport = ServerState(), Stuck()
        protocol = GuardedProtocol(limits=QUICK, config=config, server_state=state, app_state={})
        protocol.connection_made(transport)
        protocol.data_received(request("GET", "/", 1, {"Connection": connection}))
        await until(lambda: transport.closing)
        assert transport.written.endswith(b"{}") and not transport.aborted
        await until(lambda: transport.aborted)

    on_a_loop(main())


def test_more_connections_than_the_limit_are_turned_away() -> None:
    async def main() -> None:
        async with serving(limits=Limits(connections=3)) as served:
            held = [await open_to(served) for _ in range(3)]
            await until(lambda: served.connections == 3)
            for _ in range(5):
                reader, writer = await open_to(served)
                got = await read_to_the_end(reader)
                assert got.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in got
                writer.close()
            held[0][1].close()
            await until(lambda: served.connections == 2)
            assert (await ask(served.port, "GET", "/v2/health/live")).status == 200
            for _, writer in held:
                writer.close()

    on_a_loop(main())


def test_two_hundred_clients_that_connect_and_vanish_leave_nothing() -> None:
    async def main() -> None:
        async with serving() as served:
            await ask(served.port, "GET", "/v2/health/live")
            await until(lambda: served.connections == 0)
            gc.collect()
            before, tasks = descriptors(), len(asyncio.all_tasks())
            for number in range(200):
                client = socket.create_connection(("127.0.0.1", served.port))
                if number % 4 == 1:
                    client.sendall(b"POST /v2/models/iden")
                elif number % 4 == 2:
                    client.sendall(request("POST", "/v2/models/identity/slow", served.port, body=b"{}"))
                elif number % 4 == 3:
                    client.sendall(request("GET", "/v1/events", served.port))
                if number % 3 == 0:  # a reset instead of an end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                if number % 5 == 0:
                    await asyncio.sleep(0)
                client.close()
            await until(lambda: served.connections == 0 and not served.server.state.tasks)
            await until(lambda: len(asyncio.all_tasks()) <= tasks and descriptors() <= before)
            assert served.gateway.running == 0
            assert not served.gateway.feeds
            assert served.server.app.door.meter.active == 0 and served.server.app.door.meter.held == 0

    on_a_loop(main())


def test_a_request_ends_when_its_client_goes_unless_it_changes_what_runs() -> None:
    async def main() -> None:
        async with serving() as served:
            _, writer = await open_to(served)
            writer.write(request("POST", "/v2/models/identity/slow", served.port, body=b"{}"))
            await served.gateway.slow_entered.wait()
            writer.close()
            await until(lambda: served.gateway.cancelled == 1)
            served.gateway.slow_entered.clear()
            _, writer = await open_to(served)
            writer.write(request("PUT", "/v1/budget?slow=true", served.port, body=b"{}"))
            await served.gateway.slow_entered.wait()
            writer.close()
            await until(lambda: served.connections == 0)
            served.gateway.slow_may_end.set()
            await until(lambda: "budget" in served.gateway.calls)

    on_a_loop(main())


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\0\0\0",
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"CONNECT example:80 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\nHost: a\n\n\xff",
    ],
)
def test_what_is_no_http_is_a_bad_request(sent: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        async with serving() as served:
            answer = await exchange(served.port, sent)
            assert 400 <= answer.status < 500
            assert set(answer.json()) >= {"error", "type"}
            assert (await ask(served.port, "GET", "/v2/health/live")).status == 200

    with logged("debug") as said:
        on_a_loop(main())
    assert "Traceback" not in "".join(capfd.readouterr()) + said.getvalue()


def test_older_http_is_named() -> None:
    async def main() -> None:
        async with serving() as served:
            answer = await exchange(served.port, b"GET /v2 HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert (answer.status, answer.json()["type"]) == (400, "ProtocolVersionError")
            assert answer.headers["connection"] == "close"

    on_a_loop(main())


def test_http_2_without_asking_is_named() -> None:
    async def main() -> None:
        async with serving() as served:
            answer = await exchange(served.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
            assert (answer.status, answer.json()["type"]) == (400, "ProtocolVersionError")

    on_a_loop(main())


def test_tls_on_the_plain_port_gets_an_alert() -> None:
    import ssl

    async def main() -> None:
        async with serving() as served:
            context = ssl.create_default_context()
            with pytest.raises(ssl.SSLError, match=r"(?i)alert|version"):
                await asyncio.open_connection("127.0.0.1", served.port, ssl=context)
            reader, writer = await open_to(served)
            writer.write(b"\x16\x03\x01\x00\x05hello")
            assert await read_to_the_end(reader) == b"\x15\x03\x01\x00\x02\x02\x46"  # fatal: protocol version
            writer.close()
            await until(lambda: served.connections == 0)

    on_a_loop(main())


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("what", ["field", "fields", "url", "unfinished"])
def test_header_fields_are_limited(what: str, pieces: int) -> None:
    async def main() -> None:
        async with serving(limits=Limits(header_bytes=8192)) as served:
            large = "x" * 30_000
            sent = {
                "field": request("GET", "/v2", served.port, {"X": large}),
                "fields": request("GET", "/v2", served.port, {f"X{n}": "y" * 100 for n in range(200)}),
                "url": request("GET", f"/{large}", served.port),
                "unfinished": f"GET / HTTP/1.1\r\nX: {large * 20}".encode(),
            }[what]
            reader, writer = await open_to(served)
            with contextlib.suppress(ConnectionError):
                for n in range(pieces):
                    writer.write(sent[n * len(sent) // pieces : (n + 1) * len(sent) // pieces])
                    await writer.drain()
                    await asyncio.sleep(0.01)
            assert (await read_to_the_end(reader)).startswith(b"HTTP/1.1 431 ")
            writer.close()

    on_a_loop(main())


def test_requests_in_one_piece_are_answered_in_order() -> None:
    async def main() -> None:
        async with serving() as served:
            reader, writer = await open_to(served)
            bodies = [b"x" * n for n in range(20)]
            writer.write(b"".join(request("POST", INFER, served.port, body=body) for body in bodies))
            for body in bodies:
                assert (await read_answer(reader)).json()["bytes"] == len(body)
            writer.close()

    on_a_loop(main())


def test_nonsense_after_a_request_does_not_get_its_answer() -> None:
    async def main() -> None:
        async with serving() as served:
            reader, writer = await open_to(served)
            writer.write(request("POST", "/v2/models/identity/slow", served.port, body=b"") + b"\0\0nonsense\r\n\r\n")
            assert await read_to_the_end(reader) == b""
            writer.close()
            await until(lambda: not served.server.state.tasks)

    on_a_loop(main())


def test_asking_for_websockets_is_answered_as_if_it_had_not() -> None:
    async def main() -> None:
        async with serving() as served:
            headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x"}
            answer = await ask(served.port, "GET", "/v2/health/live", headers)
            assert (answer.status, answer.headers["connection"]) == (200, "close")

    on_a_loop(main())
