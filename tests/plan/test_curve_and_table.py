"""The front, its knee, the smallest budget for a latency, and plans looked up instead of made."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.plan import Block, Machine, Plan, Workload, make_plan, minimum_budget, simulate
from narrowboat.plan.advice import advise
from narrowboat.plan.bound import latency_bound
from narrowboat.plan.curve import budgets, front, knee, smallest_for
from narrowboat.plan.table import PlanTable, TableRow

PAGE = 4096
MACHINE = Machine(bandwidth=PAGE * 1000.0, read_latency=0.0)


def network(seed: int = 0, count: int = 12) -> Workload:
    chance = random.Random(seed)
    blocks = tuple(
        Block(f"b{i}", n * PAGE, n * PAGE, ((i, i),)) for i, n in enumerate(chance.choices(range(1, 9), k=count))
    )
    return Workload(blocks, tuple(chance.uniform(0, 6e-3) for _ in range(count)))


def device(workload: Workload) -> Machine:
    """Copies four times as fast as storage, and host memory for a third of the weights."""
    return replace(MACHINE, copy_bandwidth=MACHINE.bandwidth * 4, host_room=workload.weight_bytes // 3, chunk=PAGE)


def plans(workload: Workload, machine: Machine = MACHINE) -> list[Plan]:
    least = minimum_budget(workload)[0]
    return [make_plan(workload, machine, b) for b in budgets(least, workload.weight_bytes, 20)]


@given(least=st.integers(1, 10**9), more=st.integers(0, 10**9), count=st.integers(1, 40))
def test_budgets_begin_at_the_least_and_end_where_everything_fits(least: int, more: int, count: int) -> None:
    found = budgets(least, least + more, count)
    assert found[0] == least
    assert found == sorted(set(found))
    assert len(found) <= max(count, 2)
    if more and count > 1:
        assert found[-1] == least + more


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_every_plan_is_equalled_by_one_of_the_front_that_is_no_larger(seed: int) -> None:
    made = plans(network(seed))
    kept = front(made)
    for before, after in pairwise(kept):
        assert before.budget < after.budget
        assert before.predicted_latency > after.predicted_latency
    for plan in made:
        assert any(
            k.budget <= plan.budget and k.predicted_latency <= plan.predicted_latency * (1 + 1e-9) for k in kept
        )


def test_the_knee_is_the_bend() -> None:
    plan = plans(network())[0]
    latencies = {10: 100.0, 20: 20.0, 30: 19.0, 40: 18.0}
    points = [replace(plan, budget=b, timing=replace(plan.timing, latency=s)) for b, s in latencies.items()]
    bend = knee(points)
    assert bend is not None
    assert bend.budget == 20
    assert knee(points[:2]) is None


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.0))
def test_the_smallest_budget_for_a_latency_meets_it_and_no_point_below_does(seed: int, share: float) -> None:
    workload = network(seed)
    points = front(plans(workload))
    fast, slow = points[-1].predicted_latency, points[0].predicted_latency
    target = fast + share * (slow - fast)
    found = smallest_for(target, points, partial(make_plan, workload, MACHINE))
    assert found is not None
    assert found.predicted_latency <= target
    assert all(p.predicted_latency > target for p in points if p.budget < found.budget)
    assert smallest_for(fast * 0.5, points, partial(make_plan, workload, MACHINE)) is None


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.2))
def test_a_table_read_back_gives_plans_that_fit_and_are_timed_anew(seed: int, share: float) -> None:
    workload = network(seed)
    table = PlanTable([TableRow("default", plan) for plan in plans(workload)])
    rows = json.loads(json.dumps(table.to_json()))
    slower = replace(MACHINE, bandwidth=MACHINE.bandwidth / 2)
    again = PlanTable.from_json(rows, {"default": workload}, slower, minimum_budget(workload))
    least = minimum_budget(workload)[0]
    budget = least + int(share * (workload.weight_bytes - least))
    row = again.best(budget)
    assert row is not None
    plan = row.plan
    assert plan.budget == budget
    assert plan.arena_bytes + workload.fixed_bytes <= budget
    assert set(plan.resident) | set(plan.streamed) == set(range(len(workload.blocks)))
    places = [plan.offsets[i] for i in plan.streamed]
    assert plan.timing == simulate(workload, slower, plan.resident, plan.streamed, places)
    assert again.best(least - 1) is None


def test_rows_of_another_workload_are_left_out() -> None:
    workload = network()
    rows = PlanTable([TableRow("default", plan) for plan in plans(workload)]).to_json()
    fewer = replace(workload, blocks=workload.blocks[:-1])
    least = minimum_budget(workload)
    assert not PlanTable.from_json(rows, {"default": fewer}, MACHINE, least).rows
    assert not PlanTable.from_json(rows, {"strict": workload}, MACHINE, least).rows
    with pytest.raises(KeyError):
        PlanTable.from_json([{"policy": "default"}], {"default": workload}, MACHINE, least)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), share=st.floats(0.0, 1.2))
def test_a_table_of_a_device_read_back_gives_plans_with_their_host_cache(seed: int, share: float) -> None:
    workload = network(seed)
    machine = device(workload)
    table = PlanTable([TableRow("default", plan) for plan in plans(workload, machine)])
    rows = json.loads(json.dumps(table.to_json()))
    slower = replace(machine, bandwidth=machine.bandwidth / 2, copy_bandwidth=machine.copy_bandwidth / 2)
    again = PlanTable.from_json(rows, {"default": workload}, slower, minimum_budget(workload))
    kept = [(plan.streamed, plan.cached, plan.timing.bytes_copied) for plan in table.plans]
    assert again.plans
    assert all((plan.streamed, plan.cached, plan.timing.bytes_copied) in kept for plan in again.plans)
    least = minimum_budget(workload)[0]
    row = again.best(least + int(share * (workload.weight_bytes - least)))
    assert row is not None
    plan = row.plan
    assert plan.cached <= set(plan.streamed)
    assert plan.cached_bytes <= slower.host_room
    places = [plan.offsets[i] for i in plan.streamed]
    assert plan.timing == simulate(workload, slower, plan.resident, plan.streamed, places, cached=plan.cached)


def test_rows_for_another_host_cache_or_without_a_device_are_left_out() -> None:
    workload = network()
    machine, least = device(workload), minimum_budget(workload)
    rows = PlanTable([TableRow("default", plan) for plan in plans(workload, machine)]).to_json()
    plain = PlanTable([TableRow("default", plan) for plan in plans(workload)]).to_json()
    older = [{k: v for k, v in row.items() if k not in ("cached", "host_room", "bytes_copied")} for row in plain]

    def read(rows: list[dict[str, Any]], machine: Machine) -> int:
        return len(PlanTable.from_json(rows, {"default": workload}, machine, least).rows)

    assert read(rows, machine) == len(rows)
    for room in (0, machine.host_room - PAGE, machine.host_room + PAGE):
        assert not read(rows, replace(machine, host_room=room))
    assert not read(rows, MACHINE)
    assert read(plain, MACHINE) == read(older, MACHINE) == len(plain)
    for one_stage in (plain, older):
        assert not read(one_stage, machine)
        assert not read(one_stage, replace(machine, host_room=0))


def test_a_row_whose_host_cache_does_not_fit_or_is_not_streamed_is_left_out() -> None:
    workload = network()
    machine, least = device(workload), minimum_budget(workload)
    row = next(
        row
        for row in PlanTable([TableRow("default", plan) for plan in plans(workload, machine)]).to_json()
        if row["cached"] and row["resident"]
    )
    for cached in (row["streamed"], [*row["cached"][1:], row["resident"][0]], [99]):
        wrong = {**row, "cached": cached}
        assert not PlanTable.from_json([wrong], {"default": workload}, machine, least).rows


def test_a_row_counts_from_the_budget_it_needs_now() -> None:
    workload = network()
    rows = PlanTable([TableRow("default", plan) for plan in plans(workload)]).to_json()
    more = 3 * PAGE
    grown = replace(workload, fixed_bytes=more, fixed_parts=(("activations", more),))
    least = minimum_budget(workload)
    then = PlanTable.from_json(rows, {"default": workload}, MACHINE, least)
    now = PlanTable.from_json(rows, {"default": grown}, MACHINE, minimum_budget(grown))
    assert now.best(then.rows[0].plan.budget) is None
    for row in then.rows:
        again = now.best(row.plan.budget + more)
        assert again is not None
        assert again.plan.resident == row.plan.resident
        assert again.plan.arena_bytes + more <= again.plan.budget


def test_advice_names_what_gains_most_first() -> None:
    workload = Workload(tuple(Block(f"b{i}", PAGE, PAGE, ((i, i),)) for i in range(20)), (1e-4,) * 20)
    plan = make_plan(workload, MACHINE, 4 * PAGE)
    said = advise(plan, workload.weight_bytes, lambda budget, on: make_plan(workload, on, budget))
    assert len(said) == 3
    shares = [int(s.split("%")[0].split()[-1]) for s in said]
    assert shares == sorted(shares, reverse=True)
    assert any("budget" in s for s in said)
    assert any("storage twice as fast" in s for s in said)
    assert any("batch of" in s for s in said)


def test_on_a_device_that_waits_for_storage_a_host_cache_is_advised() -> None:
    workload = Workload(tuple(Block(f"b{i}", PAGE, PAGE, ((i, i),)) for i in range(20)), (1e-4,) * 20)
    waiting = replace(MACHINE, copy_bandwidth=MACHINE.bandwidth * 100, copy_latency=0.0, chunk=PAGE)
    plan = make_plan(workload, waiting, 4 * PAGE)
    said = advise(plan, workload.weight_bytes, lambda budget, on: make_plan(workload, on, budget))
    assert any("a host cache of" in s for s in said)
    enough = replace(waiting, host_room=workload.weight_bytes)
    plan = make_plan(workload, enough, 4 * PAGE)
    said = advise(plan, workload.weight_bytes, lambda budget, on: make_plan(workload, on, budget))
    assert not any("a host cache of" in s or "storage" in s.split("neither")[0] for s in said)


def test_nothing_is_advised_where_computing_sets_the_pace() -> None:
    workload = Workload(tuple(Block(f"b{i}", PAGE, PAGE, ((i, i),)) for i in range(20)), (5e-2,) * 20)
    plan = make_plan(workload, MACHINE, 4 * PAGE)
    said = advise(plan, workload.weight_bytes, lambda budget, on: make_plan(workload, on, budget))
    assert said == ["computing sets the pace: neither memory nor storage would shorten a pass by 5 %"]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), contention=st.floats(0.0, 1.0), share=st.floats(0.0, 1.0))
def test_contention_slows_passes_that_read_and_the_bound_holds(seed: int, contention: float, share: float) -> None:
    workload = network(seed)
    least = minimum_budget(workload)[0]
    budget = least + int(share * (workload.weight_bytes - least))
    machine = replace(MACHINE, contention=contention)
    plan = make_plan(workload, machine, budget)
    same = [plan.offsets[i] for i in plan.streamed]
    alone = simulate(workload, MACHINE, plan.resident, plan.streamed, same, passes=3)
    assert plan.predicted_latency >= alone.latency * (1 - 1e-9)
    assert plan.predicted_latency >= latency_bound(workload, machine, budget) * (1 - 1e-9)
    if not plan.streamed:
        assert plan.predicted_latency == pytest.approx(sum(workload.step_seconds))
