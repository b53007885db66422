"""Applications of several networks with deadlines, in a part of the bytes that they demand together; run for real."""

from __future__ import annotations

import runpy
import statistics
from dataclasses import replace
from typing import Any

import narrowboat as nb
from inference_kit.children import Emit
from narrowboat.quantities import format_bytes
from narrowboat.tasks.summary import summarise
from papers_kit.check import Bench, CheckError, Measurement
from tasks_kit.real import EXAMPLES, _at, _silent, resident_bytes

_PAIR = {  # of the drone, what a quick run has time for
    "name": "pair",
    "tasks": ("people", "track"),
    "of": "drone",
}
_NEAR = 1.10


def applications(bench: Bench) -> Measurement:
    """Every task's time against running alone with everything resident, at each ratio of demand to budget."""
    effort = bench.effort
    bench.apart("weights", _weights, 600)
    alone: dict[str, int] = {}
    rows: list[dict[str, Any]] = []
    for name in effort.applications:
        tasks = _application(name)
        demand = sum(resident_bytes(tasks).values())
        for spec in tasks.settings.tasks:
            if str(spec.model) not in alone:
                alone[str(spec.model)] = _alone(tasks, spec.name, effort.alone_seconds)
                bench.say(f"{name}: {spec.name} alone takes {alone[str(spec.model)] / 1e6:.2f} s")
        for ratio in effort.ratios:
            found = _at(tasks, demand, int(demand / ratio), alone, effort.app_seconds)
            if "refused" in found:
                raise CheckError(f"{name} at 1/{ratio}: {found['refused']}")
            rows.append({"application": name, "asked": ratio, "demand_bytes": demand, **found})
            bench.say(f"{name} at 1/{found['ratio']:.2f}: peak {format_bytes(found['peak_bytes'])}")
    return told_of(rows)


def told_of(rows: list[dict[str, Any]]) -> Measurement:
    """What the claims need of the runs; pure."""
    tasks = [task for row in rows for task in row["tasks"].values()]
    served = [task["service_slowdown"] for task in tasks if task["service_slowdown"]]
    waited = [task["slowdown"] for task in tasks if task["slowdown"]]
    if not served or not waited:
        raise CheckError("no job of any application came to its end")
    jobs, missed = sum(task["jobs"] for task in tasks), sum(task["missed"] for task in tasks)
    names = {row["application"]: len(row["tasks"]) for row in rows}
    return {
        "rows": rows,
        "applications": len(names),
        "tasks": sum(names.values()),
        "reached": f"{min(row['ratio'] for row in rows):.2f} to {max(row['ratio'] for row in rows):.2f}",
        "raised": sum(row["ratio"] < row["asked"] - 0.01 for row in rows),
        "runs": len(rows),
        "median_served": statistics.median(served),
        "least_served": min(served),
        "worst_served": max(served),
        "median_response": statistics.median(waited),
        "worst_response": max(waited),
        "near": sum(value <= _NEAR for value in served),
        "served": len(served),
        "jobs": jobs,
        "missed": missed,
        "none_missed": missed == 0,
        "within_budget": all(row["peak_bytes"] <= row["budget_bytes"] for row in rows),
        "promised": sum(bool(row["admitted"]) for row in rows),
    }


def _weights(emit: Emit) -> None:
    runpy.run_path(str(EXAMPLES / "robot" / "weights.py"), run_name="__main__")
    emit("measured", done=True)


def _application(name: str) -> nb.TaskSet:
    pair = name == _PAIR["name"]
    tasks = nb.TaskSet.load(EXAMPLES / "applications" / f"{_PAIR['of'] if pair else name}.yaml")
    if pair:
        chosen = tuple(spec for spec in tasks.settings.tasks if spec.name in _PAIR["tasks"])
        settings = tasks.settings.model_copy(update={"tasks": chosen, "calibration": 3_000_000})
        tasks = nb.TaskSet(settings, tasks.folder)
    return tasks


def _alone(tasks: nb.TaskSet, name: str, seconds: float) -> int:
    """Median response in microseconds of one task with everything resident and nobody beside it."""
    spec = next(spec for spec in tasks.settings.tasks if spec.name == name)
    spec = spec.model_copy(update={"pinned": True, "period": 2_000_000, "deadline": None, "offset": 0})
    costed = next(task for task in tasks.costed if task.name == name)
    units = frozenset(k for k, unit in enumerate(costed.units) if unit.nbytes)
    settings = tasks.settings.model_copy(update={"tasks": (spec,), "budget": 4 << 30})
    only = tasks.with_settings(settings, [replace(costed, pins=units, ends=(len(costed.units),))])
    median = summarise(only.run(seconds, on_tick=_silent, admitted_only=False)).tasks[0].median
    if not median:
        raise CheckError(f"{name} alone did not end a job in {seconds:g} s")
    return median
