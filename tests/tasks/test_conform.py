"""A run that follows the rules conforms; each rule that is broken is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat import TaskSet
from narrowboat.tasks.conform import _Lost, conform
from narrowboat.tasks.record import JobRecord, Record, Segment
from task_sets_kit import three


@pytest.fixture(scope="module")
def right() -> Record:
    return TaskSet.from_dict(three()).simulate(3)


@pytest.mark.parametrize("more", [{}, {"policy": "fp"}, {"preemption": "np"}, {"prefetch": True}])
def test_what_is_simulated_conforms(more: dict[str, Any]) -> None:
    told = conform(TaskSet.from_dict(three(**more)).simulate(3))
    assert told.valid, told.wording
    assert told.missed == 0 and told.over_bound == 0
    assert "valid" in told.wording


def slower(record: Record) -> None:
    part = next(p for p in record.segments if p.what == "compute")
    record.setup["tasks"][0]["computes_us"] = [1] * 3
    assert part.task


def overlapping(record: Record) -> None:
    first = record.segments[0]
    record.segments.append(Segment("compute", "compute", "t3", 0, 0, first.begin + 700, first.end - 300))


def wrong_job(record: Record) -> None:
    # Somebody with an earlier deadline was waiting all along.
    record.jobs.append(JobRecord("t1", 99, 0, 1, 2_900_000, 2_950_000, 0, "done"))


def idle(record: Record) -> None:
    record.jobs.append(
        JobRecord("t3", 99, record.end + 10_000, record.end + 900_000, None, record.end + 50_000, 0, "done")
    )


def early(record: Record) -> None:
    record.jobs.append(JobRecord("t1", 98, 1000, 61_000, 1000, 1001, 0, "done"))


def too_much(record: Record) -> None:
    record.memory.append((5, record.setup["budget_bytes"] + 1))


def slow_answer(record: Record) -> None:
    job = next(job for job in record.jobs if job.task == "t1")
    job.finish = job.release + 59_000


def no_real_time(record: Record) -> None:
    record.premises = {
        "real_time": {"fifo": False, "pinned": True, "lost": ["the real-time class was refused"]},
        "major_faults": 0,
        "clock_step_s": 0.0,
    }


def late_wake(record: Record) -> None:
    no_real_time(record)
    record.premises["release_lateness_us"] = {"n": 3, "max": 50_000}


@pytest.mark.parametrize(
    ("breaks", "name"),
    [
        (slower, "segments within their budgets"),
        (overlapping, "decisions at boundaries only"),
        (wrong_job, "the right job at every boundary"),
        (idle, "no rest while a job waits"),
        (early, "arrivals within the contracts"),
        (too_much, "memory within the budget"),
        (late_wake, "the core is there"),
        (slow_answer, "responses within their bounds"),
        (no_real_time, "real-time conditions"),
    ],
)
def test_a_broken_premise_is_named(right: Record, breaks: Callable[[Record], None], name: str) -> None:
    record = copy.deepcopy(right)
    breaks(record)
    told = conform(record)
    assert not told.valid
    assert name in [premise.name for premise in told.premises if not premise.holds]
    assert name in told.wording and told.wording.startswith("void")


def test_a_set_that_was_not_admitted_has_no_guarantee() -> None:
    told = conform(TaskSet.from_dict(three(budget=100_000_000)).simulate(1))
    assert not told.valid and told.wording.startswith("none was given")


losses = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=12)


@given(losses, st.sampled_from([1.0, 0.9, 0.75]), st.integers(0, 100))
def test_lost_time_is_held_against_every_window(gaps: list[tuple[int, int, int]], share: float, delay: int) -> None:
    spans, at = [], 0
    for gap, length, excess in gaps:
        spans.append((at + gap, at + gap + length, excess))
        at += gap + length
    lost = _Lost(share, delay)
    for k, (begin, end, excess) in enumerate(spans):
        windows = [sum(e for _, _, e in spans[i : k + 1]) - (1 - share) * (end - spans[i][0]) for i in range(k + 1)]
        assert lost.bear(begin, end, excess) == (max(windows) <= delay + 1e-9) or abs(max(windows) - delay) < 1e-6


def test_a_part_that_lost_less_than_the_supply_may_withhold_breaks_nothing(right: Record) -> None:
    record = copy.deepcopy(right)
    part = max((p for p in record.segments if p.what == "compute"), key=lambda p: p.end - p.begin)
    task = next(task for task in record.setup["tasks"] if task["name"] == part.task)
    task["computes_us"] = [cost - 100 for cost in task["computes_us"]]
    assert "segments within their budgets" in conform(record).wording
    record.setup["supply"] = {"share": 0.5, "delay_us": 10_000}
    told = {premise.name: premise for premise in conform(record).premises}["segments within their budgets"]
    assert told.holds and "took longer" in told.said
