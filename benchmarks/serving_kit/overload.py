"""Five times what the contracts allow, on tasks that are promised something and tasks that are not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from serving_kit import asks
from serving_kit.children import Served, finish_load, shared_memory, start_load, state_of
from serving_kit.place import BEST_EFFORT, GUARANTEED, Place

FACTOR = 5.0
CONNECTIONS = 96


def streams_of(place: Place, factor: float) -> list[dict[str, Any]]:
    """Every task at so many times its contract, each answer known."""
    streams = []
    for name, (_, period) in {**GUARANTEED, **BEST_EFFORT}.items():
        rows, answers = place.known(name)
        requests = [asks.binary(name, "x", row) for row in rows]
        streams.append(asks.stream(name, requests, answers, "bytes", factor * 1e6 / period))
    return streams


def overload(place: Place, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Misses, codes, how quick refusals are, and memory."""
    seconds = 5.0 if quick else 60.0
    streams = streams_of(place, FACTOR)
    before = shared_memory()
    served, _ = place.narrowboat(place.overload())
    with served:
        plan = json.loads(served.get("/v1/plan")[1])
        executor = served.executor
        start = state_of(executor) if executor is not None else {}
        say(f"overload: {FACTOR:g} times the contracts for {seconds:g} s")
        child = start_load(served.port, streams, seconds, CONNECTIONS)
        peaks = _watch(served, seconds)
        figures = finish_load(child, seconds + 90)
        end = state_of(executor) if executor is not None else {}
        told = {
            "factor": FACTOR,
            "seconds": seconds,
            "guaranteed": sorted(GUARANTEED),
            "contracts_us": {name: list(each) for name, each in {**GUARANTEED, **BEST_EFFORT}.items()},
            "bounds_us": {task["name"]: task["response_bound_us"] for task in plan["tasks"]},
            "admitted": plan["admitted"],
            "streams": figures["streams"],
            "connections_refused": figures["connections_refused"],
            "misses": served.metric("narrowboat_deadline_misses_total"),
            "guarantee": json.loads(served.get("/v1/guarantee")[1]),
            "budget_bytes": plan["budget_bytes"],
            "peak_bytes": peaks,
            "executor_grew_bytes": end.get("peak_bytes", 0) - start.get("peak_bytes", 0),
            "restarts": sum(served.metric("narrowboat_executor_restarts_total").values()),
        }
    told["shared_memory_left"] = sorted(shared_memory() - before)
    return told


def _watch(served: Served, seconds: float) -> int:
    """The largest high-water mark that the gateway tells while it goes on."""
    most, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        most = max(most, int(sum(served.metric("narrowboat_memory_peak_bytes").values())))
        time.sleep(1.0)
    return max(most, int(sum(served.metric("narrowboat_memory_peak_bytes").values())))
