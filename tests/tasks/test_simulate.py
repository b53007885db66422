"""What is simulated never exceeds what was proved, and each policy follows its own rules."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat import TaskSet
from narrowboat.errors import TraceFormatError
from narrowboat.tasks.analysis import edf, fp
from narrowboat.tasks.analysis.memory import footprint, need
from narrowboat.tasks.analysis.model import Arrival, Block, Task
from narrowboat.tasks.analysis.pipeline import segments
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy import order
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.policy.paging import DemandPaging
from narrowboat.tasks.policy.volume import VolumeSwap
from narrowboat.tasks.record import Record
from narrowboat.tasks.simulate import Simulation, WorstCosts, periodic
from task_jobs_kit import facts, random_costs, random_set
from task_sets_kit import three

CHUNK = 2


def sporadic(tasks: list[TaskFacts], rng: random.Random, until: int) -> list[tuple[int, TaskFacts]]:
    """Releases at least a period apart, often in step with each other."""
    releases = []
    for task in tasks:
        when = rng.choice([0, 0, rng.randint(0, task.period)])
        while when < until:
            releases.append((when, task))
            when += task.period + rng.choice([0, 0, 0, rng.randint(0, task.period)])
    return sorted(releases, key=lambda each: (each[0], each[1].index))


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 10**9),
    st.integers(1, 5),
    st.floats(0.3, 0.95),
    st.sampled_from(["edf", "fp"]),
    st.booleans(),
    st.booleans(),
)
def test_no_response_is_over_its_bound_and_no_byte_over_the_need(
    seed: int, count: int, utilisation: float, policy: str, preempt: bool, prefetch: bool
) -> None:
    rng = random.Random(seed)
    tasks, everything, cut = random_set(seed, count, utilisation)
    if prefetch:  # one chunk more for a prefetch that has to be given up first
        tasks = [
            Task(t.name, (t.segments[0] + CHUNK, *t.segments[1:]), t.arrival, t.deadline, t.priority) for t in tasks
        ]
    analysed = tasks if preempt else [task.whole() for task in tasks]
    room = {"edf": edf, "fp": fp}[policy]
    bounds = {task.name: room.response(analysed, task).bound for task in analysed}
    levels = {task.name: task.deadline if policy == "edf" else -task.priority for task in tasks}
    parts = [
        footprint(t.name, blocks, f.activation_bytes, levels[t.name])
        for t, f, blocks in zip(tasks, everything, cut, strict=True)
    ]
    budget = need(parts, keep=preempt).nbytes
    for costs in (WorstCosts(), random_costs(rng), random_costs(rng, 0.8)):
        run = Simulation(
            BlockBoundaries(order.ORDERS[policy], preempt=preempt, prefetch=prefetch),
            costs,
            chunk=CHUNK,
            budget=budget,
        )
        record = run.run(sporadic(everything, rng, 40 * max(f.period for f in everything)))
        assert all(job.finish is not None for job in record.jobs)
        for name, responses in record.responses().items():
            bound = bounds[name]
            assert bound is None or max(responses) <= bound, name
        if all(bound is not None and bound <= t.deadline for t, bound in zip(analysed, bounds.values(), strict=True)):
            assert max(nbytes for _, nbytes in record.memory) <= budget


def test_a_job_is_preempted_at_a_boundary_and_keeps_its_block() -> None:
    slow = [Block(2, 5, 10), Block(2, 5, 10), Block(2, 5, 10)]
    quick = [Block(1, 1, 3)]
    low = facts(Task("low", segments(slow), Arrival(100), 100), 0, slow)
    high = facts(Task("high", segments(quick), Arrival(50), 10), 1, quick)
    record = Simulation(BlockBoundaries(order.edf), WorstCosts()).run([(0, low), (3, high)])
    done = [(s.what, s.task, s.block, s.begin, s.end) for s in record.segments]
    assert done == [
        ("load", "low", 0, 0, 2),
        ("load", "low", 1, 2, 4),
        ("compute", "low", 0, 2, 7),
        ("load", "high", 0, 7, 8),
        ("compute", "high", 0, 8, 9),
        ("load", "low", 2, 9, 11),
        ("compute", "low", 1, 9, 14),
        ("compute", "low", 2, 14, 19),
    ]
    told = {job.task: job for job in record.jobs}
    assert (told["low"].preemptions, told["high"].preemptions) == (1, 0)
    assert max(nbytes for _, nbytes in record.memory) == 20


def test_without_preemption_the_job_goes_on() -> None:
    slow = [Block(2, 5), Block(2, 5)]
    quick = [Block(1, 1)]
    low = facts(Task("low", segments(slow), Arrival(100), 100), 0, slow)
    high = facts(Task("high", segments(quick), Arrival(50), 10), 1, quick)
    record = Simulation(BlockBoundaries(order.edf, preempt=False), WorstCosts()).run([(0, low), (3, high)])
    assert {job.task: job.finish for job in record.jobs} == {"low": 12, "high": 14}


def test_a_prefetched_block_saves_its_load_and_a_wrong_one_costs_a_chunk() -> None:
    blocks = [Block(6, 4, 5)]
    left = facts(Task("left", segments(blocks), Arrival(40), 40), 0, blocks)
    right = facts(Task("right", segments(blocks), Arrival(40), 40), 1, blocks)
    policy = BlockBoundaries(order.edf, prefetch=True)
    record = Simulation(policy, WorstCosts(), chunk=CHUNK).run([(10, left), (20, right)])
    assert {job.task: job.response for job in record.jobs} == {"left": 4, "right": 4}
    late = facts(Task("late", segments(blocks), Arrival(40), 40), 2, blocks)
    sooner = Simulation(BlockBoundaries(order.edf, prefetch=True), WorstCosts(), chunk=CHUNK)
    # The first to come is prefetched from the start; it arrives in the middle of its own load.
    record = sooner.run([(3, left), (4, late)])
    assert next(job for job in record.jobs if job.task == "left").response == 7


def test_best_effort_waits_for_all_that_is_guaranteed() -> None:
    blocks = [Block(0, 4), Block(0, 4)]
    promised = facts(Task("promised", segments(blocks), Arrival(100), 100), 0, blocks)
    rest = facts(Task("rest", segments(blocks), Arrival(100), 5), 1, blocks, guaranteed=False)
    record = Simulation(BlockBoundaries(order.edf), WorstCosts()).run([(0, rest), (1, promised)])
    assert {job.task: job.finish for job in record.jobs} == {"rest": 16, "promised": 12}


def test_volume_swapping_runs_whole_jobs_and_overlaps_the_next_swap() -> None:
    def task(name: str, index: int, compute: int, deadline: int, swap: int) -> TaskFacts:
        return TaskFacts(name, index, (1,), (compute,), (swap,), deadline, 100, swap_bytes=swap)

    first, second, third = task("a", 0, 10, 50, 6), task("b", 1, 10, 60, 6), task("c", 2, 10, 70, 6)
    policy = VolumeSwap([first, second, third], free_bytes=12)
    record = Simulation(policy, WorstCosts()).run([(0, first), (0, second), (0, third)])
    done = [(s.what, s.task, s.begin, s.end) for s in record.segments]
    assert done == [
        ("swap_in", "a", 0, 6),
        ("swap_in", "b", 6, 12),
        ("run", "a", 6, 16),
        ("swap_out", "a", 16, 22),
        ("run", "b", 16, 26),
        ("swap_in", "c", 22, 28),
        ("run", "c", 28, 38),
    ]


def test_demand_paging_reads_again_what_a_larger_set_has_pushed_out() -> None:
    blocks = [Block(2, 1, 10), Block(2, 1, 10)]
    task = facts(Task("t", segments(blocks), Arrival(50), 50), 0, blocks)

    def loads(cache: int) -> int:
        record = Simulation(DemandPaging(cache), WorstCosts()).run(periodic([task], 200))
        return sum(s.what == "load" for s in record.segments)

    assert (loads(20), loads(10)) == (2, 8)


def test_a_record_survives_its_file_and_a_broken_one_is_refused() -> None:
    told = json.loads(json.dumps(TaskSet.from_dict(three()).simulate(1).as_json()))
    assert Record.from_json(told).as_json() == told
    for broken in ({}, [], {**told, "format": "other"}, {**told, "jobs": [{}]}, {**told, "segments": 3}):
        with pytest.raises(TraceFormatError):
            Record.from_json(broken)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("jobs", 0, "outcome"), "zzz"),
        (("jobs", 0, "finish"), float("nan")),
        (("jobs", 0, "finish"), None),
        (("jobs", 0, "release"), float("inf")),
        (("jobs", 0, "release"), "x"),
        (("jobs", 0, "task"), "nobody"),
        (("segments", 1, 4), -1),
        (("segments", 0, 4), 99),
        (("segments", 0, 6), -5),
        (("segments", 0, 1), "dream"),
        (("memory", 0, 0), -1),
        (("end_us",), 0),
        (("setup", "policy"), "zz"),
        (("setup", "supply", "share"), 0),
        (("setup", "tasks"), []),
        (("setup", "tasks", 0, "period_us"), 0),
        (("setup", "tasks", 0, "loads_us"), [1]),
        (("setup", "tasks", 0, "name"), "t2"),
    ],
)
def test_a_record_of_what_cannot_have_been_is_refused(path: tuple[str | int, ...], value: object) -> None:
    told = json.loads(json.dumps(TaskSet.from_dict(three()).simulate(0.2).as_json()))
    place = told
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(TraceFormatError):
        Record.from_json(told)
