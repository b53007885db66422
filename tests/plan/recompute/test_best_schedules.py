"""The table holds the fastest schedule of every budget, and knows the least budget."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from narrowboat.errors import BudgetError
from narrowboat.plan.recompute import Chain, Kept, Segment, evaluate, frontier, solve
from recompute_kit import every_schedule, random_chain

RANDOMS = st.integers(0, 2**32).map(Random)  # a seed: hypothesis' own random leans to zeros


def keep_all(chain: Chain) -> tuple[float, int]:
    return evaluate(chain, [Kept(unit) for unit in range(len(chain.units))])


def check_all(chain: Chain, *, segments: bool) -> None:
    """Every budget's best against all schedules."""
    table = solve(chain, limit=200, segments=segments)
    assert table.slot == 1
    least = np.full(201, math.inf)
    for items in every_schedule(chain, 0, len(chain.units), segments=segments):
        seconds, peak = evaluate(chain, items)
        least[peak] = min(least[peak], seconds)
    assert table.seconds.tolist() == np.minimum.accumulate(least).tolist()
    for budget, _ in frontier(table):
        schedule = table.best(budget)
        assert schedule.seconds == least[: budget + 1].min()
        assert schedule.peak_bound <= budget
        assert evaluate(chain, schedule.items) == (schedule.seconds, schedule.peak_bound)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(1, 2), (2, 3), (3, 3), (4, 1), (4, 2)]), st.booleans(), RANDOMS)
def test_no_schedule_at_all_is_faster_in_any_budget(size: tuple[int, int], storage: bool, random: Random) -> None:
    count, options = size
    chain, _ = random_chain(random, count, options=options, storage=storage)
    check_all(chain, segments=True)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(2, 3), (4, 3), (5, 3), (7, 2)]), st.booleans(), RANDOMS)
def test_none_is_faster_with_options_alone(size: tuple[int, int], storage: bool, random: Random) -> None:
    count, options = size
    chain, _ = random_chain(random, count, options=options, storage=storage)
    check_all(chain, segments=False)


@settings(max_examples=20, deadline=None)
@given(st.booleans(), RANDOMS)
@example(True, Random(5928))  # the fastest sends inputs away that the next boundary holds, and then that boundary
def test_five_units_with_boundaries_on_storage_too(storage: bool, random: Random) -> None:
    chain, _ = random_chain(random, 5, options=1, storage=storage)
    table = solve(chain, limit=200)
    taken = [evaluate(chain, items) for items in every_schedule(chain, 0, 5)]
    for budget in range(table.minimum, 200):
        assert table.seconds[budget] == min(seconds for seconds, peak in taken if peak <= budget)
    assert table.minimum == min(peak for _, peak in taken)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.booleans(), st.floats(0.05, 1.0), RANDOMS)
def test_bytes_in_slots_stay_a_bound(count: int, storage: bool, share: float, random: Random) -> None:
    chain, _ = random_chain(random, count, most=10**7, options=3, storage=storage)
    table = solve(chain, int(keep_all(chain)[1] * share), slots=50)
    assert table.slot > 1
    for budget, seconds in frontier(table):
        schedule = table.best(budget)
        assert schedule.peak_bound <= budget
        assert schedule.seconds == pytest.approx(seconds)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.booleans(), st.booleans(), st.floats(0.3, 2.0), RANDOMS)
def test_the_minimum_that_is_told_is_taken(
    count: int, storage: bool, segments: bool, share: float, random: Random
) -> None:
    chain, _ = random_chain(random, count, most=10**6, options=2, storage=storage)
    limit = int(keep_all(chain)[1] * share)
    table = solve(chain, limit, segments=segments)
    if table.minimum > limit:
        with pytest.raises(BudgetError) as refused:
            table.best(limit)
        assert refused.value.minimum == table.minimum
    for budget in {table.minimum, table.minimum + table.slot // 2, max(limit, table.minimum)}:
        assert solve(chain, budget, segments=segments).best(budget).peak_bound <= budget
    with pytest.raises(BudgetError):
        table.best(table.minimum - 1)


def test_the_fastest_schedule_of_a_wide_budget_keeps_everything() -> None:
    chain, _ = random_chain(Random(1), 8, most=10**6)
    seconds, peak = keep_all(chain)
    schedule = solve(chain, 2 * peak).best(2 * peak)
    assert (schedule.seconds, schedule.peak_bound) == (seconds, peak)
    assert schedule.describe(chain) == "kept 0-7"


def test_without_recomputing_only_options_are_left() -> None:
    chain, _ = random_chain(Random(5), 12, most=10**6, options=2)
    table = solve(chain, 0, segments=False)
    assert solve(chain, 0).minimum < table.minimum < keep_all(chain)[1]
    assert all(isinstance(item, Kept) for item in table.best(table.minimum).items)
    with pytest.raises(BudgetError, match="no unit may be recomputed"):
        table.best(0)


def test_the_unit_that_sets_the_minimum_is_named() -> None:
    chain, _ = random_chain(Random(2), 6, options=1)
    large = chain.units[3]
    huge = type(large)("huge", 1.0, 1.0, 1.0, (type(large.options[0])("keep", 0, 0, 10**6),), 0, 0)
    chain = Chain((*chain.units[:3], huge, *chain.units[4:]), chain.carried)
    with pytest.raises(BudgetError, match="huge needs") as refused:
        solve(chain, 1000).best(1000)
    assert refused.value.limiter == "huge"
    assert 10**6 <= refused.value.minimum < 1.02 * 10**6


def test_time_falls_and_memory_rises_along_the_frontier() -> None:
    chain, _ = random_chain(Random(3), 12, most=10**6)
    points = frontier(solve(chain, keep_all(chain)[1]))
    assert len(points) > 5
    assert all(here[0] < there[0] and here[1] > there[1] for here, there in pairwise(points))


def test_segments_nest_where_memory_is_short() -> None:
    chain, _ = random_chain(Random(4), 24, most=10**6, options=1)
    table = solve(chain, keep_all(chain)[1])
    items = table.best(table.minimum).items
    assert any(isinstance(inner, Segment) for item in items if isinstance(item, Segment) for inner in item.inside)
