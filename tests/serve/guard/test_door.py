"""The door, over real sockets: who is let in, how much, and what every answer carries."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from narrowboat.errors import BeyondContractError, ForbiddenError, NotServingError, UnauthorizedError
from narrowboat.serve.settings import Limits
from serve_guard_kit import (
    Served,
    ask,
    exchange,
    log_lines,
    logged,
    on_a_loop,
    read_answer,
    request,
    serving,
    until,
)

INFER, SLOW = "/v2/models/identity/infer", "/v2/models/identity/slow"
USE, ADMIN = "u" * 20, "a" * 20


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text(f"use {USE}\nadmin {ADMIN}\n")
    file.chmod(0o600)
    return file


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_tokens_open_what_their_right_is_for(tokens: Path) -> None:
    async def main() -> None:
        async with serving(tokens=tokens) as served:
            port = served.port
            for path in ("/", "/v2/health/live", "/v2/health/ready", "/openapi.json"):
                assert (await ask(port, "GET", path)).status == 200
            for headers in ({}, bearer("x" * 20), {"Authorization": f"Basic {USE}"}, bearer(USE[:-1])):
                for method, path in (("GET", "/v1/plan"), ("POST", INFER), ("PUT", "/v1/budget"), ("GET", "/none")):
                    refused = await ask(port, method, path, headers, b"")
                    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
                    assert refused.json()["type"] == "UnauthorizedError"
            assert (await ask(port, "GET", "/v1/plan", bearer(USE))).status == 200
            refused = await ask(port, "PUT", "/v1/budget", bearer(USE), b"")
            assert (refused.status, refused.json()["type"]) == (403, "ForbiddenError")
            for path in ("/v2/repository/models/spare/load", "/v2/repository/models/%73pare/load"):
                assert (await ask(port, "POST", path, bearer(USE), b"")).status == 403
            assert not {"budget", "load"} & set(served.gateway.calls)
            assert (await ask(port, "PUT", "/v1/budget", bearer(ADMIN), b"")).status == 200
            assert (await ask(port, "POST", "/v2/repository/models/spare/load", bearer(ADMIN), b"")).status == 200

    on_a_loop(main())


def test_guessing_tokens_is_limited(tokens: Path) -> None:
    async def main() -> None:
        async with serving(tokens=tokens, limits=Limits(rate=1, burst=5)) as served:
            statuses = [(await ask(served.port, "GET", "/v1/plan", bearer("x" * 20))).status for _ in range(8)]
            assert statuses == [401] * 5 + [429] * 3
            assert (await ask(served.port, "GET", "/v1/plan", bearer(USE))).status == 200  # who knows one is not

    on_a_loop(main())


def test_calls_of_grpc_go_by_the_same_rules(tokens: Path) -> None:
    async def main() -> None:
        async with serving(tokens=tokens, limits=Limits(rate=1, burst=3)) as served:
            door = served.server.app.door
            door.authorise({}, "open")
            door.authorise({"authorization": f"Bearer {USE}"}, "use")
            with pytest.raises(UnauthorizedError):
                door.authorise({"authorization": "Bearer no"}, "use")
            for right in ("admin", "whatever else"):
                with pytest.raises(ForbiddenError):
                    door.authorise({"authorization": f"Bearer {USE}"}, right)
            door.authorise({"authorization": f"Bearer {ADMIN}"}, "admin")
            door.authorise({"authorization": f"Bearer {USE}"}, "use")
            with pytest.raises(BeyondContractError):
                for _ in range(3):
                    door.authorise({"authorization": f"Bearer {USE}"}, "use")
            door.draining = True
            with pytest.raises(NotServingError):
                door.authorise({"authorization": f"Bearer {ADMIN}"}, "use")

    on_a_loop(main())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://localhost:1"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_cannot_ask(headers: dict[str, str], status: int) -> None:
    async def main() -> None:
        async with serving() as served:
            for method, path in (("POST", INFER), ("PUT", "/v1/budget"), ("GET", "/v1/plan"), ("GET", "/v1/events")):
                if status == 200 and path == "/v1/events":
                    continue
                answer = await ask(served.port, method, path, headers, b"")
                assert answer.status == status, (method, path)
            assert ("budget" in served.gateway.calls) is (status == 200)
            # A link on another page may lead to ours.
            link = await ask(served.port, "GET", "/", {"Sec-Fetch-Site": "cross-site"})
            assert link.status == 200

    on_a_loop(main())


def test_our_own_page_may_ask() -> None:
    async def main() -> None:
        async with serving() as served:
            for host in (f"localhost:{served.port}", f"127.0.0.1:{served.port}"):
                headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
                assert (await ask(served.port, "PUT", "/v1/budget", headers, b"")).status == 200

    on_a_loop(main())


def test_header_fields_that_decide_may_not_be_given_twice(tokens: Path) -> None:
    async def main() -> None:
        async with serving(tokens=tokens) as served:
            for field in (f"Authorization: Bearer {USE}", "Host: evil.example", "Origin: http://evil.example"):
                sent = request(
                    "GET", "/v1/plan", served.port, {**bearer(USE), "Origin": f"http://127.0.0.1:{served.port}"}
                )
                answer = await exchange(served.port, sent.replace(b"\r\n\r\n", f"\r\n{field}\r\n\r\n".encode()))
                assert answer.status == 400

    on_a_loop(main())


def test_a_missing_host_is_refused() -> None:
    async def main() -> None:
        async with serving() as served:
            assert (await exchange(served.port, b"GET /v2 HTTP/1.1\r\n\r\n")).status == 400

    on_a_loop(main())


def test_a_body_that_is_declared_too_large_is_refused_before_it_comes() -> None:
    async def main() -> None:
        async with serving(limits=Limits(body_bytes=1000)) as served:
            head = request("POST", INFER, served.port, {"Content-Length": "1001", "Expect": "100-continue"})
            answer = await exchange(served.port, head)
            assert (answer.status, answer.json()["type"]) == (413, "TooLargeError")
            assert (await ask(served.port, "POST", INFER, body=bytes(1000))).json()["bytes"] == 1000

    on_a_loop(main())


def test_a_client_that_sends_it_all_first_still_reads_why_and_may_go_on() -> None:
    async def main() -> None:
        async with serving(limits=Limits(body_bytes=1 << 20)) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(request("POST", INFER, served.port, body=bytes((1 << 20) + 1)))
            await writer.drain()
            assert (await read_answer(reader)).status == 413
            writer.write(request("POST", INFER, served.port, body=b"abc"))
            assert (await read_answer(reader)).json()["bytes"] == 3
            writer.close()

    on_a_loop(main())


def test_a_body_that_grows_too_large_is_refused() -> None:
    async def main() -> None:
        async with serving(limits=Limits(body_bytes=1000)) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(request("POST", INFER, served.port, {"Transfer-Encoding": "chunked"}))
            for _ in range(5):
                writer.write(b"ff\r\n" + bytes(255) + b"\r\n")
            answer = await read_answer(reader)
            assert (answer.status, answer.json()["type"]) == (413, "TooLargeError")
            writer.close()
            await until(lambda: served.server.app.door.meter.held == 0)

    on_a_loop(main())


def test_what_comes_after_a_refusal_is_thrown_away_within_limits() -> None:
    async def main() -> None:
        async with serving(limits=Limits(body_bytes=1000)) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(request("POST", INFER, served.port, {"Content-Length": str(1 << 30)}))
            assert (await read_answer(reader)).status == 413
            with pytest.raises(ConnectionError):
                for _ in range(1000):
                    writer.write(bytes(1 << 16))
                    await writer.drain()
                    await asyncio.sleep(0.001)
            writer.close()

    on_a_loop(main())


def test_all_bodies_together_are_limited() -> None:
    async def main() -> None:
        async with serving(limits=Limits(body_bytes=1000, held_bytes=1500)) as served:
            _, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(request("POST", INFER, served.port, {"Content-Length": "1000"}, bytes(900)))
            meter = served.server.app.door.meter
            await until(lambda: meter.held == 900)
            answer = await ask(served.port, "POST", INFER, body=bytes(700))
            assert (answer.status, answer.json()["type"]) == (503, "NotServingError")
            writer.close()
            await until(lambda: meter.held == 0)
            assert (await ask(served.port, "POST", INFER, body=bytes(700))).status == 200

    on_a_loop(main())


async def fill(served: Served, number: int) -> list[asyncio.StreamWriter]:
    writers = []
    for _ in range(number):
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(request("POST", SLOW, served.port, body=b""))
        writers.append(writer)
    await until(lambda: served.gateway.running == number)
    return writers


@pytest.mark.parametrize(
    ("limits", "status"), [(Limits(requests=3), 503), (Limits(requests_per_client=3), 429)], ids=["all", "client"]
)
def test_requests_under_way_are_limited_and_health_is_not(limits: Limits, status: int) -> None:
    async def main() -> None:
        async with serving(limits=limits) as served:
            writers = await fill(served, 3)
            refused = await ask(served.port, "POST", INFER, body=b"")
            assert (refused.status, refused.headers["retry-after"]) == (status, "1")
            assert (await ask(served.port, "GET", "/v2/health/live")).status == 200
            served.gateway.slow_may_end.set()
            await until(lambda: served.gateway.running == 0)
            assert (await ask(served.port, "POST", INFER, body=b"")).status == 200
            for writer in writers:
                writer.close()

    on_a_loop(main())


def test_a_clients_rate_is_limited() -> None:
    async def main() -> None:
        async with serving(limits=Limits(rate=0.5, burst=4)) as served:
            answers = [await ask(served.port, "GET", "/v1/plan") for _ in range(6)]
            assert [answer.status for answer in answers] == [200] * 4 + [429] * 2
            assert answers[-1].json()["type"] == "BeyondContractError"
            assert answers[-1].headers["retry-after"] == "2"

    on_a_loop(main())


def test_every_answer_carries_its_id_and_what_keeps_browsers_safe() -> None:
    async def main() -> None:
        async with serving() as served:
            seen = set()
            for path in ("/v1/plan", "/none", "/v1/broken", "/"):
                answer = await ask(served.port, "GET", path)
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["referrer-policy"] == "no-referrer"
                assert answer.headers["cache-control"] == ("no-cache" if path == "/" else "no-store")
                assert "date" in answer.headers and "server" not in answer.headers
                seen.add(answer.headers["x-request-id"])
            assert len(seen) == 4
            own = await ask(served.port, "GET", "/v1/plan", {"X-Request-Id": "mine-1.a:b_c"})
            assert own.headers["x-request-id"] == "mine-1.a:b_c"
            for insane in ("a b", "x" * 65, "<script>", "\xe9"):
                answer = await ask(served.port, "GET", "/v1/plan", {"X-Request-Id": insane})
                assert answer.headers["x-request-id"] != insane

    on_a_loop(main())


def test_the_log_has_each_request_and_never_a_token(tokens: Path) -> None:
    async def main() -> None:
        async with serving(tokens=tokens, access_log=True) as served:
            await ask(served.port, "POST", INFER, {**bearer(USE), "X-Request-Id": "seven"}, b"")
            await ask(served.port, "POST", "/v2/models/none/infer", bearer(USE), b"")
            await ask(served.port, "PUT", "/v1/budget", bearer(USE), b"")
            await ask(served.port, "PUT", "/v1/budget", bearer("wrong-" * 4), b"")
            await ask(served.port, "PUT", "/v1/budget", bearer(ADMIN), b"")

    with logged("debug") as said:
        on_a_loop(main())
    text = said.getvalue()
    assert not [token for token in (USE, ADMIN, "wrong-wrong") if token in text]
    lines = log_lines(text)
    first, second, *_ = [line for line in lines if line["event"] == "request"]
    assert first | {"path": "/v2/models/{model}/infer", "task": "identity", "id": "seven", "method": "POST"} == first
    assert (first["status"], first["outcome"]) == (200, "ok") and first["ms"] >= 0 and len(first["who"]) == 8
    assert (second["status"], second["outcome"], second["task"]) == (404, "NoSuchTaskError", "none")
    admin = [line for line in lines if line["event"] == "admin"]
    assert [line["outcome"] for line in admin] == ["ForbiddenError", "UnauthorizedError", "ok"]
    assert [line["what"] for line in admin] == ["PUT /v1/budget"] * 3
    assert admin[1]["who"] == "unknown" and admin[0]["who"] == first["who"] != admin[2]["who"]


def test_admin_actions_are_logged_without_an_access_log() -> None:
    async def main() -> None:
        async with serving() as served:
            await ask(served.port, "GET", "/v1/plan")
            await ask(served.port, "PUT", "/v1/budget", body=b"")

    with logged() as said:
        on_a_loop(main())
    events = [line["event"] for line in log_lines(said.getvalue())]
    assert events.count("admin") == 1 and "request" not in events


def test_a_crash_is_in_the_log_under_the_id_that_the_client_has() -> None:
    async def main() -> None:
        async with serving() as served:
            answer = await ask(served.port, "GET", "/v1/broken")
            assert answer.status == 500 and b"secret" not in answer.body and b"Traceback" not in answer.body
            ids.append(answer.json()["request_id"])
            assert answer.headers["x-request-id"] == ids[0]

    ids: list[str] = []
    with logged() as said:
        on_a_loop(main())
    failed = [line for line in log_lines(said.getvalue()) if line["event"] == "failed"]
    assert [line["id"] for line in failed] == ids and "a secret detail" in failed[0]["traceback"]
