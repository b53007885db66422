"""Whatever bytes come: the server answers the next client, and nothing of the last is left."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrowboat.serve.settings import Limits
from serve_guard_kit import ask, logged, request, serving, until

VALID = (
    request("POST", "/v2/models/identity/infer", 1, {"Transfer-Encoding": "chunked"}, None) + b"3\r\nabc\r\n0\r\n\r\n"
)
PIECES = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /v2/models/identity/infer HTTP/1.1\r\n",
        b"Host: localhost\r\n",
        b"Content-Length: 5\r\n",
        b"Content-Length: 99999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
        b"Connection: upgrade\r\nUpgrade: h2c\r\n",
        b"\r\n",
        b"\n",
        b"\0",
        b"5\r\nhello\r\n",
        b"0\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"\x16\x03\x01\x02\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET http://evil.example/v1/plan HTTP/1.1\r\n",
        b"OPTIONS * HTTP/1.1\r\n",
        b"GET /%ff%00/../..//etc HTTP/1.1\r\n",
    ]
)


@st.composite
def attacks(draw: st.DrawFn) -> bytes:
    """Valid pieces in any order, with bytes changed, cut and put in."""
    sent = bytearray(
        draw(st.one_of(st.just(VALID), st.lists(PIECES | st.binary(max_size=30), max_size=12).map(b"".join)))
    )
    for _ in range(draw(st.integers(0, 4))):
        if sent:
            sent[draw(st.integers(0, len(sent) - 1))] = draw(st.integers(0, 255))
    return bytes(sent[: draw(st.integers(0, len(sent)))] if draw(st.booleans()) else sent)


@pytest.mark.timeout(120)
def test_no_bytes_whatever_hurt(capfd: pytest.CaptureFixture[str]) -> None:
    async def attack(port: int, sent: bytes, halves: bool) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        got = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            for piece in (sent[: len(sent) // 2], sent[len(sent) // 2 :]) if halves else (sent,):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if halves:
                writer.write_eof()
            async with asyncio.timeout(0.05):
                while piece := await reader.read(1 << 16):
                    got += piece
        writer.close()
        return got

    limits = Limits(
        header_seconds=1, body_seconds=1, write_seconds=1, idle_seconds=1, body_bytes=4096, held_bytes=8192
    )
    with logged("debug") as said, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        context = serving(limits=limits)
        served = runner.run(context.__aenter__())

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(attacks(), st.booleans())
        def fuzz(sent: bytes, halves: bool) -> None:
            got = runner.run(attack(served.port, sent, halves))
            assert got == b"" or got.startswith((b"HTTP/1.1 ", b"\x15\x03"))
            assert not got.startswith((b"HTTP/1.1 500", b"HTTP/1.1 501", b"HTTP/1.1 502"))

        try:
            fuzz()
            assert runner.run(ask(served.port, "GET", "/v2/health/live")).status == 200
            runner.run(until(lambda: served.connections == 0 and not served.server.state.tasks))
            meter = served.server.app.door.meter
            assert (meter.active, meter.held, served.server.app.door.working) == (0, 0, 0)
        finally:
            runner.run(context.__aexit__(None, None, None))
    assert "Traceback" not in "".join(capfd.readouterr()) + said.getvalue()
