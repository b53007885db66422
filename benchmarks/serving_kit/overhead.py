"""What the gateway adds to the executor's own response, as a client sees it."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

from serving_kit import asks
from serving_kit.children import HERE, ServerFailedError, load
from serving_kit.place import Place

ROUNDS = 5


def overhead(place: Place, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Requests one after another, by each protocol in turn: latency at the client less ``response_us``."""
    rounds, seconds, count = (2, 1.0, 200) if quick else (ROUNDS, 4.0, 2_000)
    rows, answers = place.known("tiny")
    ways = {
        "HTTP, JSON": asks.stream("HTTP, JSON", [asks.text("tiny", "x", row) for row in rows], answers, "oip"),
        "HTTP, binary": asks.stream("HTTP, binary", [asks.binary("tiny", "x", row) for row in rows], answers, "bytes"),
    }
    pairs = [_pair(row.tobytes(), answer) for row, answer in zip(rows, answers, strict=True)]
    served, grpc_port = place.narrowboat(place.tiny())
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*ways, "gRPC")}
    with served:
        load(served.port, [ways["HTTP, binary"]], 1.0, 1)  # the first requests find everything cold
        for number in range(rounds):
            say(f"overhead: round {number + 1} of {rounds}")
            for name, stream in ways.items():
                found[name].append(load(served.port, [stream], seconds, 1)["streams"][name])
            found["gRPC"].append(_grpc(grpc_port, pairs, count))
        own = {name: served.metric(f"narrowboat_gateway_overhead_seconds_{name}") for name in ("sum", "count")}
    return {
        "rounds": rounds,
        "ways": {name: _together(each) for name, each in found.items()},
        "own_mean_us": round(own["sum"].get("", 0) / max(own["count"].get("", 0), 1) * 1e6, 1),
    }


def _pair(given: bytes, answer: bytes) -> list[str]:
    return [base64.b64encode(part).decode() for part in (given, answer)]


def _grpc(port: int, pairs: list[list[str]], count: int) -> dict[str, Any]:
    plan = {"target": f"127.0.0.1:{port}", "task": "tiny", "input": "x", "count": count, "pairs": pairs}
    command = [sys.executable, str(HERE / "grpc_client.py")]
    done = subprocess.run(command, input=json.dumps(plan), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise ServerFailedError(f"the gRPC client failed: {done.stderr[-800:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _together(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds: the median of their medians, the worst of their tails."""
    told = {}
    for what in ("latency_us", "beside_response_us"):
        spreads = [each[what] for each in rounds]
        told[what] = {
            "n": sum(each["n"] for each in spreads),
            "p50": round(median(each["p50"] for each in spreads), 1),
            "p50_of_rounds": [each["p50"] for each in spreads],
            "p99": round(median(each["p99"] for each in spreads), 1),
            "max": max(each["max"] for each in spreads),
        }
    bad = ("wrong", "lost", "hung", "failed")
    return {**told, "wrong_or_lost": sum(each.get(key, 0) for each in rounds for key in bad)}
