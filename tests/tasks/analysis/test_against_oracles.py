"""Our analysis against PROSA's (response-time-analysis), against tests that are exact, and against brute force."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.tasks.analysis import edf, fp
from narrowboat.tasks.analysis.cuts import balanced_cuts, merge
from narrowboat.tasks.analysis.model import Arrival, Block, Supply, Task
from narrowboat.tasks.analysis.pipeline import makespan, makespan_in_bytes, segments

prosa = pytest.importorskip("response_time_analysis.model", reason="response-time-analysis is not installed")
from response_time_analysis.analysis import edf as prosa_edf  # noqa: E402
from response_time_analysis.analysis import fp as prosa_fp  # noqa: E402


@dataclass(frozen=True)
class Named(prosa.Task):  # type: ignore[name-defined,misc]
    """Tasks of equal parameters are not equal: version 0.1.1 would drop a twin."""

    name: str = ""


def theirs(tasks: list[Task], supply: Supply, policy: str) -> list[int | None]:
    described = [
        Named(
            prosa.PeriodicWithJitter(task.arrival.period, task.arrival.jitter)
            if task.arrival.jitter
            else prosa.Sporadic(task.arrival.period),
            prosa.LimitedPreemptive(prosa.WCET(task.cost), max_nps=task.longest, last_nps=task.last),
            prosa.Deadline(task.deadline),
            prosa.Priority(task.priority),
            name=task.name,
        )
        for task in tasks
    ]
    model = (
        prosa.IdealProcessor()
        if supply.ideal
        else prosa.RateDelayModel(supply.share.denominator, supply.share.numerator, supply.delay)
    )
    rta = {"edf": prosa_edf.rta, "fp": prosa_fp.rta}[policy]
    whole = prosa.taskset(*described) if hasattr(prosa, "taskset") else prosa.TaskSet(tuple(described))
    return [rta(whole, task, model, horizon=10**6).response_time_bound for task in described]


SEGMENTS = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)
SUPPLIES = st.sampled_from([Supply(), Supply(Fraction(9, 10), 3), Supply(Fraction(7, 10), 11)])


@st.composite
def task_sets(draw: st.DrawFn) -> list[Task]:
    count = draw(st.integers(1, 5))
    tasks = []
    for index in range(count):
        parts = draw(SEGMENTS)
        period = draw(st.integers(sum(parts), 90))
        jitter = draw(st.sampled_from([0, 0, 5, 2 * period]))
        tasks.append(
            Task(f"t{index}", parts, Arrival(period, jitter), draw(st.integers(1, period)), draw(st.integers(0, 3)))
        )
    return tasks


@settings(max_examples=150, deadline=None)
@given(tasks=task_sets(), supply=SUPPLIES, policy=st.sampled_from(["edf", "fp"]))
def test_response_times_are_those_of_prosas_analysis(tasks: list[Task], supply: Supply, policy: str) -> None:
    analysis = {"edf": edf, "fp": fp}[policy]
    utilisation = sum(task.utilisation for task in tasks)
    if utilisation > supply.share * Fraction(97, 100):
        return  # near and over the edge their fixpoint is cut off by a horizon of its own
    assert [analysis.response(tasks, task, supply).bound for task in tasks] == theirs(tasks, supply, policy)


def jeffay(tasks: list[tuple[int, int]]) -> bool:
    """Jeffay, Stanat and Martel's condition (RTSS 1991), exact for non-preemptive EDF with D = T."""
    ordered = sorted(tasks, key=lambda each: each[1])
    if sum(Fraction(cost, period) for cost, period in ordered) > 1:
        return False
    for i in range(1, len(ordered)):
        cost, period = ordered[i]
        for length in range(ordered[0][1] + 1, period):
            demand = cost + sum((length - 1) // t * c for c, t in ordered[:i])
            if demand > length:
                return False
    return True


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), st.integers(4, 40)), min_size=1, max_size=4))
def test_the_demand_test_without_preemption_is_jeffays(parameters: list[tuple[int, int]]) -> None:
    parameters = [(min(cost, period), period) for cost, period in parameters]
    tasks = [Task(f"t{i}", (cost,), Arrival(period), period) for i, (cost, period) in enumerate(parameters)]
    try:
        ours = edf.violation(tasks) is None
    except OverflowError:
        ours = False
    assert ours is jeffay(parameters)


@settings(max_examples=100, deadline=None)
@given(tasks=task_sets(), supply=SUPPLIES)
def test_where_the_demand_test_fails_its_numbers_say_so(tasks: list[Task], supply: Supply) -> None:
    try:
        found = edf.violation(tasks, supply)
    except OverflowError:
        assert sum(task.utilisation for task in tasks) >= supply.share
        return
    if found is not None:
        demand = sum(t.arrival.eta(found.instant - t.deadline + 1) * t.cost for t in tasks)
        assert (demand, supply.bound(found.instant)) == (found.demand, found.supply)
        assert found.demand + found.blocking > found.supply
        assert found.blocking == max([t.longest - 1 for t in tasks if t.deadline > found.instant], default=0)
        assert not found.blocking or any(t.name == found.blocker and t.longest - 1 == found.blocking for t in tasks)


@settings(max_examples=100, deadline=None)
@given(tasks=task_sets())
def test_the_largest_segment_is_the_largest(tasks: list[Task]) -> None:
    """With every task that could block at its limit the shorter deadlines hold; one unit more and one is missed."""
    tasks = [Task(t.name, t.segments, Arrival(t.arrival.period), t.deadline) for t in tasks]
    last = max(tasks, key=lambda t: t.deadline)
    shorter = [t for t in tasks if t.deadline < last.deadline]
    if not shorter or sum(t.utilisation for t in tasks) > 1:
        return
    limit = edf.largest_segment(tasks, last)
    assert limit is not None

    def early_enough(segment: int) -> bool:
        """The demand test up to the last deadline, with that much blocking."""
        for instant in range(1, last.deadline):
            demand = sum(t.arrival.eta(instant - t.deadline + 1) * t.cost for t in shorter)
            if demand and demand + segment - 1 > instant:
                return False
        return True

    assert early_enough(limit)
    assert not early_enough(limit + 1)


BLOCKS = st.lists(st.builds(Block, st.integers(0, 9), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(BLOCKS)
def test_two_buffers_are_a_chain_of_segments(blocks: list[Block]) -> None:
    assert makespan(blocks, 2) == sum(segments(blocks))
    assert makespan(blocks, 1) == sum(block.load + block.compute for block in blocks)
    assert makespan(blocks, len(blocks)) == makespan_in_bytes(blocks, sum(block.nbytes for block in blocks))


@settings(max_examples=150, deadline=None)
@given(
    BLOCKS,
    st.one_of(st.none(), st.integers(3, 40)),
    st.one_of(st.none(), st.integers(5, 40)),
    st.integers(0, 3),
)
def test_balanced_cuts_are_the_best_of_all(
    units: list[Block], longest: int | None, room: int | None, overhead: int
) -> None:
    def allowed(blocks: list[Block]) -> bool:
        sizes = [block.nbytes for block in blocks]
        pairs = [a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True)]
        return (longest is None or max(segments(blocks, overhead)) <= longest) and (room is None or max(pairs) <= room)

    every = []
    for count in range(len(units)):
        for inner in itertools.combinations(range(1, len(units)), count):
            blocks = merge(units, [*inner, len(units)])
            if allowed(blocks):
                every.append(sum(segments(blocks, overhead)))
    found = balanced_cuts(units, longest=longest, room=room, overhead=overhead)
    assert (found is None) is (not every)
    if found is not None:
        blocks = merge(units, found)
        assert allowed(blocks)
        assert sum(segments(blocks, overhead)) == min(every)
