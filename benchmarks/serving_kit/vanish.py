"""Clients that connect and vanish, at every stage of a request; nothing of them may stay behind."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from serving_kit import asks
from serving_kit.children import load, state_of
from serving_kit.place import Place

STAGES = ("connected", "half the headers", "half the body", "all of it", "all of it, then reset")
CLIENTS = 1000
AT_ONCE = 50
GONE = 20.0  # seconds in which everything of them has to be gone


def vanish(place: Place, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """The gateway's descriptors, threads, connections and memory before and after."""
    clients = 100 if quick else CLIENTS
    rows, answers = place.known("tiny")
    requests = [asks.binary("tiny", "x", row) for row in rows]
    served, _ = place.narrowboat(place.tiny())
    with served:
        pid, port = served.process.pid, served.port
        check = asks.stream("check", requests, answers, "bytes", 200.0)
        load(port, [check], 1.0, 4)
        # Once without looking: what a process takes only the first time is no leak.
        vanishing(port, requests[0], AT_ONCE)
        settled(pid, port, {**state_of(pid, port), "connections": 0})
        before = state_of(pid, port)
        say(f"vanish: {clients} clients")
        begin = time.monotonic()
        refused = vanishing(port, requests[0], clients)
        took = time.monotonic() - begin
        seconds = settled(pid, port, before)
        after = state_of(pid, port)
        in_flight = sum(served.metric("narrowboat_requests_in_flight").values())
        then = load(port, [check], 1.0, 4)["streams"]["check"]
    return {
        "clients": clients,
        "stages": list(STAGES),
        "refused": refused,
        "seconds": round(took, 2),
        "settled_seconds": seconds,
        "before": before,
        "after": after,
        "in_flight_after": in_flight,
        "then": {key: then[key] for key in ("sent", "ok", "wrong", "lost", "hung")},
    }


def vanishing(port: int, request: bytes, clients: int) -> int:
    """So many clients, stage by stage in turn, some at once; how many could not even connect."""
    refused, request = 0, asks.at(request, port)
    for first in range(0, clients, AT_ONCE):
        with contextlib.ExitStack() as held:
            for number in range(first, min(first + AT_ONCE, clients)):
                client = held.enter_context(socket.socket())
                client.settimeout(10)
                try:
                    client.connect(("127.0.0.1", port))
                    client.sendall(_until(STAGES[number % len(STAGES)], request))
                except OSError:
                    refused += 1
                if number % len(STAGES) == len(STAGES) - 1:
                    # Closing with a linger of nothing resets the connection.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return refused


def _until(stage: str, request: bytes) -> bytes:
    head = request.find(b"\r\n\r\n") + 4
    return {
        "connected": b"",
        "half the headers": request[: head // 2],
        "half the body": request[: (head + len(request)) // 2],
    }.get(stage, request)


def settled(pid: int, port: int, before: dict[str, int]) -> float | None:
    """Seconds until a process has no more descriptors and connections than before; None if it never has."""
    begin = time.monotonic()
    while time.monotonic() < begin + GONE:
        now = state_of(pid, port)
        if now["fds"] <= before["fds"] and now["connections"] <= before["connections"]:
            return round(time.monotonic() - begin, 2)
        time.sleep(0.05)
    return None
