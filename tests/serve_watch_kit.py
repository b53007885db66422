"""A made-up executor: what was assumed, and ticks of what happened. Times in microseconds of its run."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20
LOAD, COMPUTE = 1_000, 2_000  # of the one block of each task
BUDGET = 64 * MIB


def setup(*names: str, share: float = 0.95, delay: int = 50_000, best_effort: tuple[str, ...] = ()) -> dict[str, Any]:
    """As ``TaskSet.setup`` makes it, of tasks with one block each."""
    return {
        "policy": "edf",
        "preemption": "lp-keep",
        "prefetch": False,
        "budget_bytes": BUDGET,
        "supply": {"share": share, "delay_us": delay},
        "overhead_us": 200,
        "chunk_us": 0,
        "admitted": True,
        "tasks": [
            {
                "name": name,
                "index": index,
                "priority": 0,
                "guaranteed": name not in best_effort,
                "deadline_us": 20_000,
                "period_us": 20_000,
                "jitter_us": 0,
                "loads_us": [LOAD],
                "computes_us": [COMPUTE],
                "nbytes": [MIB],
                "activation_bytes": 0,
                "bound_us": None if name in best_effort else 10_000,
            }
            for index, name in enumerate(names)
        ],
    }


def plan(told: dict[str, Any], admitted: bool = True, reasons: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plan that goes with a setup, as far as it matters here."""
    tasks = [
        {"name": task["name"], "response_bound_us": task["bound_us"], "deadline_us": task["deadline_us"]}
        for task in told["tasks"]
    ]
    return {"admitted": admitted, "reasons": list(reasons), "budget_bytes": told["budget_bytes"], "tasks": tasks}


def job(task: str, number: int, release: int, took: int | None = 4_000, **other: Any) -> dict[str, Any]:
    """One that ended; ``took`` None: it did not come to its end."""
    finish = None if took is None else release + took
    told = {"task": task, "number": number, "release": release, "due": release + 20_000, "start": release + 100}
    return {**told, "finish": finish, "preemptions": 0, "outcome": "done", "cause": "", **other}


def parts(told: dict[str, Any], load: int = LOAD, compute: int = COMPUTE) -> list[list[Any]]:
    """The segments of such a job."""
    begin = told["start"]
    ids = [told["task"], told["number"], 0]
    middle = begin + load
    return [["load", "load", *ids, begin, middle, MIB], ["compute", "compute", *ids, middle, middle + compute, 0]]


def tick(now: int, jobs: list[dict[str, Any]] | None = None, **other: Any) -> dict[str, Any]:
    """One picture, with the jobs that ended and their segments."""
    jobs = jobs or []
    told: dict[str, Any] = {
        "event": "tick",
        "now_us": now,
        "time": 1_800_000_000 + now / 1e6,
        "held_bytes": 20 * MIB,
        "budget_bytes": BUDGET,
        "peak_bytes": 30 * MIB,
        "pools": {"resident": 12 * MIB, "swap": 6 * MIB, "swap_limit": 10 * MIB, "other": 2 * MIB},
        "busy": {"compute": 0.5, "load": 0.25},
        "busy_us": {"compute": now // 2, "load": now // 4},
        "doing": {},
        "pending": [],
        "in": {},
        "coming": {},
        "tasks": {},
        "jobs": jobs,
        "jobs_lost": 0,
        "segments": [part for each in jobs if each["finish"] is not None for part in parts(each)],
        "segments_lost": 0,
        "counters": {"overruns": 0, "prefetch_hit": 0, "prefetch_aborted": 0, "prefetch_wasted": 0, "blocks_found": 0},
        "late_wake_us": 100,
        "major_faults": 0,
    }
    return {**told, **other}


class Clock:
    """Unix seconds that go on when they are told to."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
