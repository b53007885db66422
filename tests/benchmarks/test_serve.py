"""The parts of ``benchmarks/serve.py``: its client counts right, and tells what a server did wrong."""

from __future__ import annotations

import base64
import itertools
import json
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving_kit import asks
from serving_kit.children import connections_of, free_ports, load, state_of
from serving_kit.kill import outcomes
from serving_kit.report import markdown
from serving_kit.spread import spread
from serving_kit.vanish import STAGES, vanishing

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "serve.py"
ANSWER = b"\x00\x00\x80?"  # 1.0
JSON = b'{"parameters":{"response_us":100,"met":true},"outputs":[{"data":[[1.0]]}]}'
# What a server does with its nth request: the bytes that it writes, or None to close the connection.
Behaviour = Callable[[int], bytes | None]


def reply(body: bytes, head: int | None = None, status: int = 200, more: str = "") -> bytes:
    told = f"inference-header-content-length: {head}\r\n" if head is not None else ""
    return f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n{told}{more}\r\n".encode() + body


@contextmanager
def server(behaviour: Behaviour) -> Iterator[int]:
    """A server of HTTP/1.1 that behaves so; its port."""
    numbers = itertools.count()
    lock = threading.Lock()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while True:
                length, line = 0, b"x"
                while line.strip():
                    line = self.rfile.readline()
                    if not line:
                        return
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                if len(self.rfile.read(length)) < length:
                    return
                with lock:
                    answer = behaviour(next(numbers))
                if answer is None:
                    return
                if answer:
                    self.wfile.write(answer)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Clients vanish here."""

    with Server(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield serving.server_address[1]
        finally:
            serving.shutdown()
            thread.join()


def ask(check: str = "bytes", rate: float | None = None) -> dict[str, Any]:
    return asks.stream("s", [asks.http("/", b"{}")], [ANSWER], check, rate)


def figures(behaviour: Behaviour, **options: Any) -> dict[str, Any]:
    rate, check = options.pop("rate", 100.0), options.pop("check", "bytes")
    with server(behaviour) as port:
        found: dict[str, Any] = load(port, [ask(check, rate)], 0.5, 4, **options)["streams"]["s"]
        return found


def test_right_answers_are_counted_with_what_is_beside_the_response() -> None:
    found = figures(lambda n: reply(JSON + ANSWER, len(JSON)))
    assert (found["sent"], found["ok"], found["wrong"], found["lost"], found["hung"]) == (50, 50, 0, 0, 0)
    assert found["statuses"] == {"200": 50} and found["unmet"] == 0
    latency, beside = found["latency_us"], found["beside_response_us"]
    assert latency["n"] == beside["n"] == 50
    assert beside["p50"] == pytest.approx(latency["p50"] - 100, abs=0.2)


def test_wrong_refused_unmet_and_lost_are_told_apart() -> None:
    late = JSON.replace(b"true", b"false")
    answers: list[bytes | None] = [
        reply(JSON + ANSWER, len(JSON)),
        reply(JSON + b"\x00\x00\x80\xbf", len(JSON)),
        reply(b"{}", status=429),
        reply(late + ANSWER, len(late)),
        None,
    ]
    found = figures(lambda n: answers[n % 5])
    assert found["statuses"] == {"200": 30, "429": 10}
    assert [found[key] for key in ("ok", "wrong", "unmet", "lost")] == [20, 10, 10, 10]
    assert found["refusal_us"]["n"] == 10


def test_no_answer_is_no_end_of_the_benchmark() -> None:
    found = figures(lambda n: b"" if n == 3 else reply(JSON + ANSWER, len(JSON)), timeout=0.4)
    assert (found["hung"], found["ok"], found["lost"]) == (1, 49, 0)


def test_answers_in_json_are_compared_by_their_bits() -> None:
    assert figures(lambda n: reply(JSON), check="oip")["ok"] == 50
    assert figures(lambda n: reply(JSON.replace(b"1.0", b"1.0000002")), check="oip")["wrong"] == 50
    assert figures(lambda n: reply(b'{"y": [1.0]}'), check="litserve")["ok"] == 50


def test_in_a_closed_loop_the_next_goes_out_with_the_answer_and_closed_connections_are_replaced() -> None:
    found = figures(lambda n: reply(JSON + ANSWER, len(JSON), more="Connection: close\r\n"), rate=None)
    assert found["ok"] == found["sent"] > 50 and found["lost"] == 0
    assert found["rate"] > 100


def test_a_log_says_what_a_crash_did_to_whom() -> None:
    log: list[list[Any]] = [
        [0.0, 1, "sent"], [0.1, 1, 200],  # before
        [0.9, 1, "sent"], [0.95, 2, "sent"], [0.97, 3, "sent"],
        [1.2, 1, 503], [1.5, 2, "lost"],
        [1.6, 1, "sent"], [1.7, 1, 503],
        [4.0, 1, "sent"], [4.1, 1, 200],
        [5.0, 2, "sent"], [5.1, 2, 200],
    ]  # fmt: skip
    assert outcomes(log, killed=1.0) == {
        "under_way": {"503": 1, "lost": 1},
        "since": {"503": 1, "200": 2},
        "back_seconds": 3.1,
        "slowest_seconds": 0.5,
        "never_ended": 1,
    }


def test_vanishing_clients_leave_and_are_seen_to() -> None:
    asked: list[int] = []

    def behaviour(number: int) -> bytes:
        asked.append(number)
        return reply(JSON)

    with server(behaviour) as port:
        begun = state_of(os.getpid(), port)
        assert begun["connections"] == 0 and begun["fds"] > 3 and begun["rss_bytes"] > 1 << 20
        assert vanishing(port, asks.http("/", b"x" * 100), 50) == 0
        until = 500
        while connections_of(port) and until:
            threading.Event().wait(0.02)
            until -= 1
        assert connections_of(port) == 0
    # All of it, once politely and once with a reset, which may overtake what was sent.
    assert 10 <= len(asked) <= 20 and len(STAGES) == 5
    assert vanishing(free_ports(1)[0], b"x", 5) == 5  # nobody listens


def test_requests_are_what_the_protocol_says() -> None:
    row = np.ones((1, 4), np.float32)
    whole = asks.binary("tiny", "x", row)
    head, _, body = whole.partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v2/models/tiny/infer HTTP/1.1\r\n")
    assert body.endswith(row.tobytes())
    assert f"Content-Length: {len(body)}".encode() in head
    assert f"Inference-Header-Content-Length: {len(body) - row.nbytes}".encode() in head
    assert base64.b64decode(asks.stream("s", [whole], [b"1"], "bytes")["pairs"][0][0]) == whole
    assert b"[" in asks.text("tiny", "x", row)


def test_figures_are_of_what_was_measured() -> None:
    assert spread([]) == {"n": 0}
    assert spread(range(1, 101)) == {"n": 100, "p50": 51, "p90": 91, "p99": 100, "max": 100}


def test_the_page_has_every_section_that_was_measured() -> None:
    head = {"commit": "abc", "date": "2026-01-01", "cores": 2, "took_seconds": 3, "quick": True}
    times = spread([100.0, 200.0])
    row = {"sent": 10, "ok": 8, "wrong": 0, "unmet": 1, "lost": 1, "hung": 0, "statuses": {"200": 8, "429": 1}}
    row = {**row, "latency_us": times, "refusal_us": spread([])}
    state = {"fds": 9, "threads": 3, "rss_bytes": 1 << 20, "peak_bytes": 1 << 21, "connections": 0}
    broken = [{"premise": "segments", "said": "a block took 9 ms of 1 ms"}]
    told = {
        "overhead": {
            "rounds": 2,
            "own_mean_us": 300.0,
            "ways": {"gRPC": {"latency_us": times, "beside_response_us": times, "wrong_or_lost": 0}},
        },
        "throughput": {
            "rate": 1000.0,
            "seconds": 30,
            "rounds": 3,
            "open": {"ours": row},
            "closed": {"ours": {"rate": 2_000.0, "p50_us": 1.0, "p99_us": 2.0, "not_right": 0}},
        },
        "overload": {
            "factor": 5.0,
            "seconds": 60,
            "budget_bytes": 1 << 26,
            "peak_bytes": 1 << 25,
            "executor_grew_bytes": 1 << 20,
            "restarts": 0.0,
            "guaranteed": ["radar"],
            "bounds_us": {"radar": 9_000, "extra": None},
            "guarantee": {"valid": False, "broken": broken},
            "misses": {'cause="late",task="radar"': 0.0, 'cause="late",task="extra"': 4.0},
            "streams": {"radar": {**row, "unmet": 0}, "extra": row},
        },
        "kill": {
            "first_ready_seconds": 9.0,
            "rounds": [{**outcomes([], 0.0)}],
            "gateway_before": state,
            "gateway_after": state,
            "shared_memory_left": [],
        },
        "vanish": {
            "clients": 1000,
            "seconds": 2.0,
            "stages": list(STAGES),
            "settled_seconds": 0.1,
            "in_flight_after": 0.0,
            "before": state,
            "after": state,
            "then": {"ok": 5, "sent": 5},
        },
    }
    page = markdown({name: {**head, **section} for name, section in told.items()})
    for words in ("gateway adds", "thousand requests", "## Overload", "is killed", "Clients that vanish"):
        assert words in page
    assert "| radar | yes | 9 ms | 10 | 8 | 0 | 0 | 200: 8, 429: 1 | 1 |" in page
    assert "| extra | no |  | 10 | 8 | 0 | 4 |" in page
    assert "void: segments: a block took" in page
    only = markdown({"vanish": {**head, **told["vanish"]}})
    assert "Overload" not in only and "at abc, 2026-01-01, 2 cores" in only.lower()


def test_a_quick_run_measures_a_real_gateway(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", "vanish"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "serve.json").read_text())["vanish"]
    assert told["refused"] == 0 and told["settled_seconds"] is not None
    assert told["then"]["ok"] == told["then"]["sent"] == 200
    again = subprocess.run([*command, "--only", "none"], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "Clients that vanish" in again.stdout
    assert "no section" in subprocess.run([*command, "--only", "x"], capture_output=True, text=True).stderr
