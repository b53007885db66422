"""A thousand requests a second without one wrong or lost answer; how many at the most; and LitServe beside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

from serving_kit import asks
from serving_kit.children import load
from serving_kit.place import Place

RATE = 1000.0
ROUNDS = 3
OPEN, CLOSED = 64, 32  # connections


def throughput(place: Place, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Open loop at ``RATE``, then closed loop in interleaved rounds, one server at a time under load."""
    seconds, each, rounds = (3.0, 1.0, 1) if quick else (30.0, 6.0, ROUNDS)
    rows, answers = place.known("tiny")
    ours_binary, ours_text = ([make("tiny", "x", row) for row in rows] for make in (asks.binary, asks.text))
    theirs = [asks.litserve(row) for row in rows]
    with ExitStack() as stack:
        served = stack.enter_context(place.narrowboat(place.tiny())[0])
        beside = stack.enter_context(place.litserve())
        subjects = {
            "narrowboat, binary": (served.port, ours_binary, "bytes"),
            "narrowboat, JSON": (served.port, ours_text, "oip"),
            "LitServe, JSON": (beside.port, theirs, "litserve"),
        }
        told: dict[str, Any] = {"rate": RATE, "seconds": seconds, "rounds": rounds, "open": {}, "closed": {}}
        for name, (port, requests, check) in subjects.items():
            load(port, [asks.stream(name, requests, answers, check)], 1.0, 4)  # the first ones find everything cold
            say(f"throughput: {name} at {RATE:g} requests/s")
            stream = asks.stream(name, requests, answers, check, RATE)
            told["open"][name] = load(port, [stream], seconds, OPEN)["streams"][name]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in subjects}
        for number in range(rounds):
            say(f"throughput: round {number + 1} of {rounds}, closed loop")
            for name, (port, requests, check) in subjects.items():
                stream = asks.stream(name, requests, answers, check)
                found[name].append(load(port, [stream], each, CLOSED)["streams"][name])
    for name, figures in found.items():
        told["closed"][name] = {
            "rate": round(median(one["rate"] for one in figures), 1),
            "rates": [one["rate"] for one in figures],
            "p50_us": round(median(one["latency_us"].get("p50", 0) for one in figures), 1),
            "p99_us": round(median(one["latency_us"].get("p99", 0) for one in figures), 1),
            "not_right": sum(one["sent"] - one["ok"] for one in figures),
        }
    return told
