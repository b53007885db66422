"""The executor is killed while requests are under way: what they are told, and how long until it is back."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from serving_kit import asks
from serving_kit.children import Served, finish_load, shared_memory, start_load, state_of
from serving_kit.overload import streams_of
from serving_kit.place import Place

ROUNDS = 3
CONNECTIONS = 16
BEFORE = 2.0  # seconds of load before it is killed
BACK = 120.0  # seconds within which it has to be back


def kill(place: Place, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Rounds of: load, SIGKILL, load until well after it is back."""
    rounds = 1 if quick else ROUNDS
    rows, answers = place.known("tiny")
    # Within the contracts, so that every refusal is one of the crash.
    streams = [each for each in streams_of(place, 0.8) if each["name"] != "tiny"]
    tiny = asks.stream("tiny", [asks.binary("tiny", "x", row) for row in rows], answers, "bytes", 60.0)
    before = shared_memory()
    served, _ = place.narrowboat(place.overload())
    found = []
    with served:
        gateway = state_of(served.process.pid, served.port)
        shared = len(shared_memory() - before)
        for number in range(rounds):
            say(f"kill: round {number + 1} of {rounds}")
            found.append(_one(served, [*streams, tiny]))
        time.sleep(1.0)
        after = state_of(served.process.pid, served.port)
        shared_after = len(shared_memory() - before)
        first = served.seconds_to_ready
        restarts = sum(served.metric("narrowboat_executor_restarts_total").values())
    return {
        "rounds": found,
        "first_ready_seconds": first,
        "back_seconds": round(median(each["back_seconds"] for each in found), 3),
        "restarts_counted": restarts,
        "gateway_before": gateway,
        "gateway_after": after,
        "shared_memory_names": [shared, shared_after],
        "shared_memory_left": sorted(shared_memory() - before),
    }


def _one(served: Served, streams: list[dict[str, Any]]) -> dict[str, Any]:
    executor = served.executor
    if executor is None:
        raise RuntimeError("the executor's process cannot be found")
    # Long enough to come back in: as long as starting took, and a while.
    seconds = min(BEFORE + 3.0 + served.seconds_to_ready + 10.0, BACK)
    child = start_load(served.port, streams, seconds, CONNECTIONS, keep=True)
    time.sleep(BEFORE + 1.0)  # the generator takes a moment to begin
    until = time.monotonic() + 3.0
    while not sum(served.metric("narrowboat_requests_in_flight").values()) and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(executor, signal.SIGKILL)
    killed = time.time()
    figures = finish_load(child, seconds + 90)
    return {**outcomes(figures["log"], killed), "streams": figures["streams"], "load_seconds": seconds}


def outcomes(log: list[list[Any]], killed: float) -> dict[str, Any]:
    """What the log of a load says of a crash at a time (Unix seconds).

    Returns:
        ``under_way``: what became of the requests that were on their way then; ``since``: the same of those that were
        sent after it; ``back_seconds``: until the first good answer to one of these; ``slowest_seconds``: an answer
        of whatever kind took, to those under way; ``never_ended``: requests without any end.
    """
    open_since: dict[int, float] = {}
    under_way: dict[str, int] = {}
    since: dict[str, int] = {}
    back, slowest = BACK, 0.0
    for when, connection, what in log:
        if what == "sent":
            open_since[connection] = when
            continue
        began = open_since.pop(connection, None)
        if began is None:
            continue
        if began <= killed < when:
            under_way[str(what)] = under_way.get(str(what), 0) + 1
            slowest = max(slowest, when - killed)
        elif began > killed:
            since[str(what)] = since.get(str(what), 0) + 1
            if what == 200:
                back = min(back, when - killed)
    return {
        "under_way": under_way,
        "since": since,
        "back_seconds": round(back, 3),
        "slowest_seconds": round(slowest, 3),
        "never_ended": len(open_since),
    }
