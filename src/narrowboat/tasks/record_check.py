"""Is a record whole, and does it speak of one run? Whoever judges it may then rely on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OUTCOMES = frozenset({"done", "late", "skipped", "aborted", "failed", "unfinished"})
_ENGINES = {"load": {"load", "prefetch", "abort", "swap_in", "swap_out"}, "compute": {"compute", "run"}}
POLICIES = ("edf", "fp", "rt-swap")
_TIMES = ("deadline_us", "period_us")
_LONGEST = 10**15  # microseconds: thirty years


def problem(setup: Mapping[str, Any], jobs: Any, segments: Any, memory: Any, end: Any) -> str:
    """What is wrong with a record's parts; empty if nothing is.

    Args:
        setup: as :meth:`TaskSet.setup` makes it.
        jobs: ``JobRecord`` objects.
        segments: ``Segment`` objects.
        memory: ``(time, bytes)``.
        end: of the run.
    """
    tasks: dict[str, Any] = {}
    for task in setup["tasks"]:
        if not isinstance(task["name"], str) or task["name"] in tasks:
            return "two tasks of one name, or one without"
        if not all(_time(task[key]) and task[key] > 0 for key in _TIMES) or not _time(task["jitter_us"]):
            return f"task {task['name']!r} has no proper period, deadline or jitter"
        sizes = {len(task[key]) for key in ("loads_us", "computes_us", "nbytes")}
        if len(sizes) != 1 or not all(_time(t) for key in ("loads_us", "computes_us") for t in task[key]):
            return f"task {task['name']!r} has no proper blocks"
        if task["bound_us"] is not None and not _time(task["bound_us"]):
            return f"task {task['name']!r} has no proper bound"
        tasks[task["name"]] = task
    if setup["policy"] not in POLICIES or setup["preemption"] not in ("lp-keep", "np"):
        return f"no such policy: {setup['policy']!r}, {setup['preemption']!r}"
    if not all(_time(setup[key]) for key in ("budget_bytes", "overhead_us", "chunk_us")) or not _time(end):
        return "budget, overhead, chunk or end is no number"
    supply = setup["supply"]
    if not (isinstance(supply["share"], (int, float)) and 0 < supply["share"] <= 1 and _time(supply["delay_us"])):
        return "the supply is none"
    for job in jobs:
        if job.task not in tasks or job.outcome not in OUTCOMES:
            return f"job {job.number!r} of {job.task!r} with outcome {job.outcome!r}"
        moments = [job.number, job.release, job.due, *(t for t in (job.start, job.finish) if t is not None)]
        if not all(_time(moment) for moment in moments):
            return f"job {job.number!r} of {job.task!r} has times that are none"
        if (job.finish is not None) != (job.outcome in ("done", "late")):
            return f"job {job.number} of {job.task!r} is {job.outcome} and has {'a' if job.finish else 'no'} finish"
    for part in segments:
        if part.task not in tasks or part.what not in _ENGINES.get(part.engine, ()):
            return f"segment {part.what!r} on {part.engine!r} of {part.task!r}"
        if not (_time(part.begin) and _time(part.end) and part.begin <= part.end <= end):
            return f"a segment of {part.task!r} from {part.begin!r} to {part.end!r}"
        if type(part.block) is not int or not 0 <= part.block < len(tasks[part.task]["loads_us"]):
            return f"{part.task!r} has no block {part.block!r}"
    if not all(_time(when) and type(held) is int and held > -_LONGEST for when, held in memory):
        return "memory at a time that is none"
    return ""


def problem_of_changes(changes: Any, end: int) -> str:
    """The same for ``Change`` objects."""
    last = 0
    for change in changes:
        numbers = (change.begin, change.end, change.allowed, change.peak_bytes)
        if not all(type(number) is int for number in numbers) or not isinstance(change.setup, Mapping):
            return "a change of tasks that is none"
        if not last <= change.begin <= change.end <= end:
            return f"a change of tasks from {change.begin} to {change.end}"
        last = change.end
    return ""


def _time(value: Any) -> bool:
    """A whole number that is not negative, and no year in which nobody lives."""
    return type(value) is int and 0 <= value <= _LONGEST
