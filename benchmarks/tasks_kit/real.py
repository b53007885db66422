"""The robot for real, beside what there would be without us; and the eleven tasks of three applications."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import narrowboat as nb
from narrowboat.machine.cgroup import MemoryCgroup, writable_memory_cgroup
from narrowboat.machine.pagecache import drop_cached
from narrowboat.tasks.conform import conform
from narrowboat.tasks.costed import always_bytes
from narrowboat.tasks.record import Record
from narrowboat.tasks.summary import summarise

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROBOT = EXAMPLES / "robot" / "tasks.yaml"
APPLICATIONS = ("self-driving", "roadside-unit", "drone")
RATIOS = (2.32, 5.81)
_SLACK = 16 << 20  # of a memory limit, for what the kernel charges beside the process


def robot(seconds: float, beside: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Ours, whole models in turn, and plain PyTorch without admission; one after the other."""
    ours = nb.TaskSet.load(ROBOT)
    say("robot: narrowboat")
    told = {"narrowboat": _figures(ours, ours.run(seconds, on_tick=_silent), ours.settings.budget)}
    say("robot: whole models, one at a time")
    whole = whole_models(ours)
    record = whole.run(beside, on_tick=_silent, admitted_only=False)
    told["whole models"] = _figures(whole, record, whole.settings.budget)
    say("robot: plain PyTorch, a thread each")
    told["plain PyTorch"] = _plain(ours, beside)
    need = sum(resident_bytes(ours).values())
    return {
        "seconds": seconds,
        "beside_seconds": beside,
        "resident_bytes": need,
        "budget_bytes": ours.settings.budget,
        "subjects": told,
    }


def _silent(picture: dict[str, Any]) -> None:
    """Nobody watches."""


def whole_models(tasks: nb.TaskSet) -> nb.TaskSet:
    """Each network swapped as one block, jobs not preempted; with the budget that this takes, if it is more."""
    one = [replace(task, ends=(len(task.units),), pins=frozenset()) for task in tasks.costed]
    settings = tasks.settings.model_copy(update={"preemption": "np", "prefetch": False})
    largest = max(sum(unit.nbytes for unit in task.units) for task in one)
    needed = largest + always_bytes(one, keep=False)
    budget = max(settings.budget, -(-needed // (1 << 20)) << 20)
    return tasks.with_settings(settings.model_copy(update={"budget": budget}), one)


def resident_bytes(tasks: nb.TaskSet) -> dict[str, int]:
    """What each task would hold with everything resident; of a network that several run, the first."""
    found: dict[str, int] = {}
    seen: set[str] = set()
    for task in tasks.costed:
        weights = sum(unit.nbytes for unit in task.units) + task.staying_bytes if task.network not in seen else 0
        seen.add(task.network)
        found[task.name] = weights + task.busy_bytes
    return found


def _figures(tasks: nb.TaskSet, record: Record, budget: int) -> dict[str, Any]:
    told, seen = summarise(record), conform(record)
    return {
        "budget_bytes": budget,
        "peak_bytes": record.premises["peak_bytes"],
        "admitted": tasks.admit().admitted,
        "valid": seen.valid,
        "wording": seen.wording,
        "broken": {premise.name: premise.said for premise in seen.premises if not premise.holds},
        "overhead_us": record.premises["boundary_overhead_us"],
        "segments": len(record.segments),
        "overruns": record.premises["overruns"],
        "tasks": {
            task.name: {
                "jobs": task.jobs,
                "missed": task.late + task.unfinished,
                "median_us": task.median,
                "worst_us": task.worst,
                "bound_us": task.bound,
                "deadline_us": task.deadline,
            }
            for task in told.tasks
        },
    }


def _plain(tasks: nb.TaskSet, seconds: float) -> dict[str, Any]:
    refused = writable_memory_cgroup()
    if refused:
        return {"refused": refused}
    for spec in tasks.settings.tasks:
        drop_cached(tasks.folder / str(spec.weights))
    with MemoryCgroup(tasks.settings.budget + _SLACK) as group:
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("plain_child.py")), str(ROBOT), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None and child.stdout is not None
        child.stdout.readline()
        group.add(child.pid)
        said, _ = child.communicate("go\n")
        killed = group.oom_kills()
    if child.returncode:
        return {"refused": f"ended with {child.returncode}" + (": killed for its memory" if killed else "")}
    jobs = json.loads(said)
    told = {}
    for spec in tasks.settings.tasks:
        times = [took for _, took in jobs["jobs"][spec.name] if took >= 0]
        asked = sum(1 for at in range(0, round(seconds * 1e6), spec.step) if at >= 0)
        told[spec.name] = {
            "jobs": asked,
            "missed": asked - sum(took <= spec.relative_deadline for took in times),
            "median_us": round(median(times)) if times else None,
            "worst_us": max(times, default=None),
            "bound_us": None,
            "deadline_us": spec.relative_deadline,
        }
    return {"budget_bytes": tasks.settings.budget, "peak_bytes": jobs["peak_bytes"], "tasks": told}


def applications(seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Each task's response against running alone with all memory, at two ratios of demand to budget."""
    alone: dict[str, int] = {}
    told: dict[str, Any] = {}
    for name in APPLICATIONS:
        tasks = nb.TaskSet.load(EXAMPLES / "applications" / f"{name}.yaml")
        demand = sum(resident_bytes(tasks).values())
        for spec in tasks.settings.tasks:
            if str(spec.model) not in alone:
                say(f"{name}: {spec.name} alone")
                alone[str(spec.model)] = _alone(tasks, spec.name)
        rows = {}
        for ratio in RATIOS:
            say(f"{name}: {ratio} times the budget")
            rows[str(ratio)] = _at(tasks, demand, int(demand / ratio), alone, seconds)
        told[name] = {"demand_bytes": demand, "ratios": rows}
    return {"seconds": seconds, "alone_us": alone, "applications": told}


def _alone(tasks: nb.TaskSet, name: str) -> int:
    """Median response of one task with everything resident and nobody beside it."""
    spec = next(spec for spec in tasks.settings.tasks if spec.name == name)
    spec = spec.model_copy(update={"pinned": True, "period": 4_000_000, "deadline": None})
    costed = next(task for task in tasks.costed if task.name == name)
    units = frozenset(k for k, unit in enumerate(costed.units) if unit.nbytes)
    settings = tasks.settings.model_copy(update={"tasks": (spec,), "budget": 4 << 30})
    only = tasks.with_settings(settings, [replace(costed, pins=units, ends=(len(costed.units),))])
    return summarise(only.run(20, on_tick=_silent, admitted_only=False)).tasks[0].median or 0


def _at(tasks: nb.TaskSet, demand: int, budget: int, alone: dict[str, int], seconds: float) -> dict[str, Any]:
    option = tasks.with_settings(tasks.settings.model_copy(update={"budget": budget}))
    verdict = option.admit()
    if verdict.needed_bytes > budget:
        # As far as it goes: the smallest budget that holds the set.
        option = tasks.with_settings(tasks.settings.model_copy(update={"budget": verdict.needed_bytes}))
        verdict = option.admit()
        if verdict.needed_bytes > option.settings.budget:
            return {"refused": "; ".join(verdict.reasons)}
    record = option.run(seconds, on_tick=_silent, admitted_only=False)
    figures = _figures(option, record, option.settings.budget)
    for spec in tasks.settings.tasks:
        row = figures["tasks"][spec.name]
        row["alone_us"] = alone[str(spec.model)]
        computed = _computing(record, spec.name)
        row["slowdown"] = round(row["median_us"] / row["alone_us"], 3) if row["median_us"] else None
        row["service_slowdown"] = round(computed / row["alone_us"], 3) if computed else None
    return {"ratio": round(demand / option.settings.budget, 2), **figures}


def _computing(record: Record, name: str) -> int:
    """Median time in which the engines served a job: its response without waiting for other tasks."""
    spans: dict[int, list[tuple[int, int]]] = {}
    for part in record.segments:
        if part.task == name and part.job >= 0 and part.what in ("load", "compute"):
            spans.setdefault(part.job, []).append((part.begin, part.end))
    done = {job.number for job in record.jobs if job.task == name and job.finish is not None}
    served = []
    for number, parts in spans.items():
        if number not in done:
            continue
        total, until = 0, 0
        for begin, end in sorted(parts):
            total += max(end - max(begin, until), 0)
            until = max(until, end)
        served.append(total)
    return round(median(served)) if served else 0
