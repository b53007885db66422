"""The gateway's process: it fails before anything starts, or serves, drains and ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from narrowboat.errors import (
    AdmissionError,
    CertificateError,
    InsecureAddressError,
    NarrowboatError,
    PortInUseError,
    ServeError,
    TokenFileError,
    UsageError,
)
from narrowboat.serve.server import Server
from narrowboat.serve.settings import Limits, ServeSettings
from serve_guard_kit import (
    LivingGateway,
    Served,
    ask,
    log_lines,
    logged,
    make_certificate,
    on_a_loop,
    read_answer,
    request,
    serving,
    small_rooms,
    until,
)

KIT = Path(__file__).parents[1] / "serve_guard_kit.py"
SLOW = "/v2/models/identity/slow"
TOKEN = "t" * 20


def refused(**settings: object) -> type[BaseException]:
    """The error of a server that cannot be made; its gateway was not made either."""
    made: list[object] = []
    with pytest.raises(NarrowboatError) as error:
        Server(
            ServeSettings(Path("tasks.yaml"), **{"port": 0, "grpc_port": None, **settings}),  # type: ignore[arg-type]
            lambda *_: made.append(1) or LivingGateway(),  # type: ignore[func-returns-value]
            lambda said: None,
            small_rooms,
        )
    assert not made
    return error.type


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_in_use_is_known_before_anything_starts(taken: int) -> None:
    assert refused(port=taken) is PortInUseError
    assert refused(grpc_port=taken) is PortInUseError


def test_the_message_says_where_and_what_to_do(taken: int) -> None:
    settings = ServeSettings(Path("tasks.yaml"), port=0, grpc_port=taken)
    with pytest.raises(PortInUseError, match=f"127.0.0.1, port {taken}.*--grpc-port"):
        Server(settings, lambda *_: LivingGateway(), lambda said: None, small_rooms)


def test_nothing_is_held_when_it_fails(taken: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused(port=port, grpc_port=taken)
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_let_in_only_with_tokens_and_tls(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = make_certificate(tmp_path)
    assert refused(host=host) is InsecureAddressError
    assert refused(host=host, certificate=certificate, key=key) is InsecureAddressError
    monkeypatch.setenv("NARROWBOAT_TOKEN", TOKEN)
    assert refused(host=host) is InsecureAddressError


def test_files_that_cannot_be_used_are_known_before_anything_starts(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    key.chmod(0o644)
    assert refused(certificate=certificate, key=key) is CertificateError
    assert refused(tokens=tmp_path / "none") is TokenFileError
    assert refused(host="192.0.2.1", tokens=None) is InsecureAddressError


def test_an_address_of_another_machine_is_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = make_certificate(tmp_path)
    monkeypatch.setenv("NARROWBOAT_TOKEN", TOKEN)
    assert refused(host="192.0.2.1", certificate=certificate, key=key) is UsageError


def test_while_it_starts_it_lives_and_is_not_ready() -> None:
    async def main() -> None:
        async with serving(wait=False, prepare=lambda gateway: gateway.may_start.clear()) as served:
            assert (await ask(served.port, "GET", "/v2/health/live")).status == 200
            assert (await ask(served.port, "GET", "/v2/health/ready")).status == 503
            assert (await ask(served.port, "GET", "/")).status == 200
            for method, path in (("POST", "/v2/models/identity/infer"), ("GET", "/v1/plan"), ("PUT", "/v1/budget")):
                early = await ask(served.port, method, path, body=b"")
                assert (early.status, early.json()["type"]) == (503, "NotServingError")
                assert int(early.headers["retry-after"]) >= 1
            assert not served.addresses
            served.gateway.may_start.set()
            await until(lambda: bool(served.addresses))
            assert (await ask(served.port, "GET", "/v2/health/ready")).status == 200

    on_a_loop(main())


def test_a_gateway_that_cannot_start_is_an_error_and_is_closed() -> None:
    gateways: list[LivingGateway] = []

    def prepare(gateway: LivingGateway) -> None:
        gateway.start_error = AdmissionError("does not fit")
        gateways.append(gateway)

    async def main() -> None:
        async with serving(prepare=prepare):
            pass

    with pytest.raises(AdmissionError):
        on_a_loop(main())
    assert gateways[0].calls == ["start", "close"]


def test_told_to_end_while_it_starts_it_ends() -> None:
    async def main() -> None:
        async with serving(wait=False, prepare=lambda gateway: gateway.may_start.clear()) as served:
            served.server.end()
            assert await served.ended()
            assert served.gateway.calls == ["start", "close"]

    on_a_loop(main())


def test_a_gateway_that_gives_up_ends_the_server() -> None:
    async def main() -> None:
        async with serving() as served:
            served.gateway.set_state("stopped", "the executor died five times")
            with pytest.raises(ServeError, match="died five times"):
                await served.ended()

    on_a_loop(main())


async def slow_request(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Under way for as long as both are kept."""
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request("POST", SLOW, served.port, body=b""))
    await served.gateway.slow_entered.wait()
    return reader, writer


def test_draining_lets_what_is_under_way_end_and_nothing_in() -> None:
    async def main() -> None:
        async with serving() as served:
            reader, _writer = await slow_request(served)
            watcher, watching = await asyncio.open_connection("127.0.0.1", served.port)
            watching.write(request("GET", "/v1/events", served.port))
            await watcher.readuntil(b"hello")
            served.server.end()
            await until(lambda: served.server.app.door.draining)
            for path, status in (("/v1/plan", 503), ("/v2/health/ready", 503), ("/v2/health/live", 200)):
                assert (await ask(served.port, "GET", path)).status == status
            assert "drain" not in served.gateway.calls
            served.gateway.slow_may_end.set()
            answer = await read_answer(reader)
            assert (answer.status, answer.json()) == (200, {"slow": True})
            assert await served.ended()
            assert served.gateway.calls == ["start", "drain", "close"]
            assert served.gateway.cancelled == 0 and not served.gateway.feeds
            with pytest.raises(ConnectionError):
                await asyncio.open_connection("127.0.0.1", served.port)

    on_a_loop(main())


def test_draining_takes_no_longer_than_it_may() -> None:
    async def main() -> None:
        async with serving(drain_seconds=0.2) as served:
            _kept = await slow_request(served)
            began = time.monotonic()
            served.server.end()
            assert await served.ended()
            assert 0.2 <= time.monotonic() - began < 5
            assert served.gateway.cancelled == 1

    with logged() as said:
        on_a_loop(main())
    assert [line["requests"] for line in log_lines(said.getvalue()) if line["event"] == "cut off"] == [1]
    assert "Traceback" not in said.getvalue()


def test_told_twice_it_ends_at_once() -> None:
    async def main() -> None:
        async with serving(drain_seconds=60.0) as served:
            _kept = await slow_request(served)
            served.server.end()
            await asyncio.sleep(0.05)
            began = time.monotonic()
            served.server.end()
            assert not await served.ended()
            assert time.monotonic() - began < 5
            assert served.gateway.calls[-1] == "close"

    on_a_loop(main())


def test_a_hangup_reloads_and_its_errors_are_logged() -> None:
    async def main() -> None:
        async with serving() as served:
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: "reload" in served.gateway.calls)
            for error in (AdmissionError("does not fit"), RuntimeError("a fault")):
                served.gateway.calls.clear()
                served.gateway.reload_error = error
                served.server.reload()
                await until(lambda: "reload" in served.gateway.calls)
            assert (await ask(served.port, "GET", "/v2/health/live")).status == 200

    with logged() as said:
        on_a_loop(main())
    lines = [line for line in log_lines(said.getvalue()) if line["event"] == "reload"]
    assert [line["outcome"] for line in lines] == ["ok", "AdmissionError", "RuntimeError"]
    assert ["traceback" in line for line in lines] == [False, False, True]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_end_drains_and_succeeds(number: int) -> None:
    with subprocess.Popen(
        [sys.executable, str(KIT), "5"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            port = int(child.stdout.readline().rsplit(":", 1)[1])
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(request("POST", SLOW, port, body=b""))
                with socket.create_connection(("127.0.0.1", port), timeout=20) as other:
                    other.sendall(request("GET", "/v2/health/live", port))
                    assert b"200" in other.recv(100)  # the slow one, which came before, is under way
                child.send_signal(number)
                client.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    client.recv(1)  # it waits
            out, err = child.communicate(timeout=20)  # the client has gone, so nothing is under way
        finally:
            child.kill()
    assert child.returncode == 0
    assert out.split() == ["start", "drain", "close"]
    events = [line["event"] for line in log_lines(err)]
    assert [event for event in events if event != "request"] == ["listening", "serving", "draining"]
    assert "Traceback" not in err


def test_a_process_that_is_told_twice_ends_at_once_and_fails() -> None:
    with subprocess.Popen(
        [sys.executable, str(KIT), "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            port = int(child.stdout.readline().rsplit(":", 1)[1])
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(request("POST", SLOW, port, body=b""))
                child.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                assert child.poll() is None
                child.send_signal(signal.SIGTERM)
                _, err = child.communicate(timeout=20)
        finally:
            child.kill()
    assert child.returncode == 1 and "Traceback" not in err


def test_over_tls_it_answers_the_same_and_old_versions_are_refused(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=str(certificate))

    async def main() -> None:
        limits = Limits(header_seconds=0.5, connections=4)
        async with serving(certificate=certificate, key=key, limits=limits) as served:
            assert served.server.addresses.http.startswith("https://127.0.0.1:")
            answer = await ask(served.port, "GET", "/v2/health/live", tls=trusting)
            assert answer.status == 200
            own = {"Origin": f"https://127.0.0.1:{served.port}"}
            assert (await ask(served.port, "PUT", "/v1/budget", own, b"", tls=trusting)).status == 200
            old = ssl.create_default_context(cafile=str(certificate))
            old.set_ciphers("DEFAULT@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await ask(served.port, "GET", "/v2/health/live", tls=old)
            # Plain HTTP, and handshakes that never end, are closed in time and count as connections.
            held = [await asyncio.open_connection("127.0.0.1", served.port) for _ in range(4)]
            held[0][1].write(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.sleep(0.1)
            for reader, writer in held:
                assert await asyncio.wait_for(reader.read(), 10) is not None
                writer.close()
            await until(lambda: served.connections == 0)
            assert (await ask(served.port, "GET", "/v2/health/live", tls=trusting)).status == 200

    with logged() as said:
        on_a_loop(main())
    assert "Traceback" not in said.getvalue()
