"""How many inputs go through a sweep together: the rule, against brute force, and what the planner is told."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import BudgetError
from narrowboat.plan import Block, Machine, Workload, make_plan
from narrowboat.plan.group import HAND_OVER, IN_FLIGHT, MOST, WORTH, choose_group, sweep

SECONDS = st.floats(1e-4, 10.0)


@given(st.lists(SECONDS, min_size=1, max_size=MOST), st.booleans())
def test_the_choice_is_the_smallest_within_two_percent_of_the_best(seconds: list[float], refused: bool) -> None:
    asked: list[int] = []

    def sweep_seconds(size: int) -> float | None:
        asked.append(size)
        return seconds[size - 1] if size <= len(seconds) else None

    chosen = choose_group(sweep_seconds, MOST if refused else len(seconds))
    rates = [(n + 1) / s for n, s in enumerate(seconds)]
    oracle = next(n + 1 for n, rate in enumerate(rates) if all(rate >= other * (1 - WORTH) for other in rates))
    assert chosen == oracle
    assert asked == list(range(1, len(asked) + 1))


def test_where_nothing_fits_inputs_go_one_by_one() -> None:
    assert choose_group(lambda size: None) == 1


BLOCKS = st.lists(st.integers(1, 40), min_size=2, max_size=10)


def workload_of(pages: list[int], step: float, fixed: int) -> Workload:
    blocks = tuple(Block(f"b{i}", n * 4096, n * 4096, ((2 * i, 2 * i),)) for i, n in enumerate(pages))
    return Workload(blocks, tuple(step for _ in range(2 * len(pages))), fixed, (("activations", fixed),))


@given(BLOCKS, st.floats(1e-6, 1e-2), st.integers(0, 1 << 16), st.integers(1, 16), st.integers(0, 1 << 16))
def test_a_sweep_computes_for_all_and_pays_for_those_that_wait(
    pages: list[int], step: float, fixed: int, size: int, each: int
) -> None:
    one = workload_of(pages, step, fixed)
    many = sweep(one, size, each)
    assert many.blocks == one.blocks
    assert many.fixed_bytes == fixed + (size - 1) * each == sum(n for _, n in many.fixed_parts)
    assert dict(many.fixed_parts).get(IN_FLIGHT, 0) == (size - 1) * each
    turns = len(pages) * HAND_OVER if size > 1 else 0.0
    assert sum(many.step_seconds) == pytest.approx(size * (sum(one.step_seconds) + turns))


@settings(deadline=None)
@given(BLOCKS, st.floats(1e-6, 1e-3), st.integers(0, 1 << 15), st.integers(0, 1 << 18))
def test_the_chosen_group_fits_the_budget_and_no_smaller_one_is_as_good(
    pages: list[int], step: float, each: int, spare: int
) -> None:
    one = workload_of(pages, step, 4096)
    machine = Machine(bandwidth=1e8)
    budget = one.fixed_bytes + max(block.nbytes for block in one.blocks) * 2 + spare

    def seconds(size: int) -> float | None:
        try:
            return make_plan(sweep(one, size, each), machine, budget).predicted_latency
        except BudgetError:
            return None

    chosen = choose_group(seconds)
    found = {n: n / s for n in range(1, MOST + 1) if (s := seconds(n)) is not None}
    assert found[chosen] >= max(found.values()) * (1 - WORTH)
    assert all(found[n] < max(found.values()) * (1 - WORTH) for n in range(1, chosen))
