"""Answers about tasks that are no trace, and the results of benchmarks, as their files say it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from narrowboat.report.records.model import About, Bytes, Count, Millis, Number, Told


class Check(Told):
    """One thing that a benchmark looked at."""

    what: str
    where: str = ""
    passed: bool
    numbers: str = ""


class BenchmarkRecord(Told):
    """A file of ``benchmarks/*.py``.

    Attributes:
        name: which of them.
        told: all that it says.
        checks: what it looked at, where it has such a list.
    """

    name: str
    told: dict[str, Any]
    checks: list[Check] = Field(default_factory=list)


class TaskAnswer(Told):
    """One task of an answer; what the kind of answer does not say is None. Times in microseconds."""

    name: str
    guarantee: str | None = None
    guaranteed: bool | None = None
    admitted: bool | None = None
    jobs: Count | None = None
    late: Count | None = None
    causes: dict[str, Count] = Field(default_factory=dict)
    median_response_us: Count | None = None
    worst_response_us: Count | None = None
    response_bound_us: Count | None = None
    deadline_us: Count
    cost_us: Count | None = None
    utilisation: Number | None = None
    pinned_bytes: Bytes | None = None
    running_bytes: Bytes | None = None


class MemoryAnswer(Told):
    """Of the tasks together."""

    budget_bytes: Bytes
    needed_bytes: Bytes | None = None
    peak_bytes: Bytes | None = None


class VerdictRecord(Told):
    """``narrowboat tasks check --json``."""

    admitted: bool
    memory: MemoryAnswer
    tasks: list[TaskAnswer]
    reasons: list[str]
    suggestions: list[str]
    overrun_tolerance_us: Count | None = None
    policy: str
    about: About = About()


class SummaryRecord(Told):
    """``narrowboat tasks run --json`` or ``simulate --json``."""

    tasks: list[TaskAnswer]
    missed: Count
    compute_share: Number
    load_share: Number
    memory: MemoryAnswer
    seconds: Millis
    about: About = About()
