"""Admission, allocation and suggestions, on tasks that are described by blocks."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat import TaskSet
from narrowboat.errors import AdmissionError, BudgetError, TaskSpecError, UsageError
from narrowboat.tasks.admission import admit, memory_need
from narrowboat.tasks.allocate import METHODS, Allocation, allocate, floor_bytes, slowdown
from narrowboat.tasks.costed import CostedTask, described
from narrowboat.tasks.spec.load import tasks_from
from task_sets_kit import MB, three


def test_the_worked_example_is_admitted_with_its_bounds_and_bytes() -> None:
    told = TaskSet.from_dict(three()).admit().as_json()
    assert told["admitted"]
    assert told["memory"]["needed_bytes"] == 194 * MB
    # In milliseconds 19, 42 and 83; a unit is a microsecond here, and blocking is a unit less than a block.
    assert [task["response_bound_us"] for task in told["tasks"]] == [19_999, 42_999, 83_000]
    assert [task["deadline_us"] for task in told["tasks"]] == [60_000, 100_000, 200_000]
    assert told["reasons"] == []


def test_without_preemption_less_memory_is_needed() -> None:
    told = TaskSet.from_dict(three(preemption="np")).admit().as_json()
    assert told["memory"]["needed_bytes"] == 168 * MB
    assert [task["response_bound_us"] for task in told["tasks"]] == [47_999, 70_999, 71_000]


def test_too_little_memory_is_refused_with_what_would_do() -> None:
    verdict = TaskSet.from_dict(three(budget=190 * MB)).admit()
    assert not verdict.admitted
    assert "memory" in verdict.reasons[0] and "t2 runs while t3" in verdict.reasons[0]
    assert any("194000000 bytes" in said for said in verdict.suggestions)
    assert any(said.startswith("preemption: np") for said in verdict.suggestions)
    with pytest.raises(AdmissionError, match="memory"):
        TaskSet.from_dict(three(budget=190 * MB)).require()


def test_a_slow_core_is_refused_at_an_instant() -> None:
    verdict = TaskSet.from_dict(three(supply={"share": 0.7, "delay": "40ms"})).admit()
    assert verdict.tasks[0].bound == pytest.approx(69_000, abs=1500)
    assert not verdict.admitted
    assert any(said.startswith("demand: within 60 ms work of 12 ms is due") for said in verdict.reasons)


def test_overload_is_told_in_shares() -> None:
    told = three()
    told["tasks"][2]["period"] = "50ms"
    verdict = TaskSet.from_dict(told).admit()
    assert any(said.startswith("overload: the tasks need 115% of the core") for said in verdict.reasons)
    assert verdict.tasks[2].bound is None


def apply_period(told: dict[str, Any], said: str) -> dict[str, Any]:
    """What a suggestion of a longer period says, done."""
    words = said.removeprefix("period: ").split()
    longer = words[0]
    for task in told["tasks"]:
        if task["name"] == words[-1]:
            task["period"] = f"{longer}{words[1]}"
    return told


def test_the_suggested_period_admits_the_set() -> None:
    told = three(budget=300 * MB, supply={"share": 0.7, "delay": "40ms"})
    refused = TaskSet.from_dict(told).admit()
    assert not refused.admitted
    said = next(said for said in refused.suggestions if said.startswith("period: "))
    assert TaskSet.from_dict(apply_period(told, said)).admit().admitted


def test_finer_cuts_and_pins_are_suggested_where_they_help() -> None:
    told = {
        "budget": 100 * MB,
        "tasks": [
            {"name": "quick", "period": "20ms", "blocks": [{"load": "1ms", "compute": "4ms", "bytes": MB}]},
            {
                "name": "slow",
                "period": "200ms",
                "blocks": [
                    {"load": "2ms", "compute": "19ms", "bytes": MB},
                    {"load": "19ms", "compute": "2ms", "bytes": MB},
                ],
            },
        ],
    }
    said = TaskSet.from_dict(told).admit().suggestions
    assert any(each.startswith("finer cuts: slow's segments") for each in said)
    told["tasks"][1]["blocks"] = [{"load": "19ms", "compute": "2ms", "bytes": MB}] * 2
    refused = TaskSet.from_dict(told).admit()
    assert any(each.startswith("pin: ") and "of slow" in each for each in refused.suggestions)
    assert TaskSet.from_dict({**told, "allocation": "optimal"}).admit().admitted


def test_best_effort_costs_the_others_one_block() -> None:
    told = three()
    alone = TaskSet.from_dict({**told, "tasks": told["tasks"][:1]}).admit()
    told["tasks"][1]["guarantee"] = "best-effort"
    with_it = TaskSet.from_dict({**told, "tasks": told["tasks"][:2]}).admit()
    assert alone.tasks[0].bound == 12_000
    assert with_it.tasks[0].bound == 12_000 + 4_999
    assert with_it.tasks[1].bound is None and with_it.admitted


def test_pinned_blocks_need_no_load_and_always_count() -> None:
    told = three(budget=300 * MB)
    told["tasks"][0]["pinned"] = True
    verdict = TaskSet.from_dict(told).admit()
    assert verdict.tasks[0].cost == 10_000
    assert verdict.memory.pinned == 60 * MB
    assert verdict.needed_bytes == 60 * MB + max(106 + 88, 4 + 56 + 88) * MB


def random_tasks(seed: int, count: int, budget: int, method: str) -> tuple[list[CostedTask], Any]:
    rng = random.Random(seed)
    tasks = [
        {
            "name": f"t{k}",
            "period": f"{rng.randint(50, 400)}ms",
            "importance": rng.choice([0.5, 1, 3]),
            "activation_bytes": rng.randint(1, 9) * MB,
            "blocks": [
                {
                    "load": f"{rng.randint(0, 9)}ms",
                    "compute": f"{rng.randint(1, 9)}ms",
                    "bytes": rng.randint(0, 20) * MB,
                }
                for _ in range(rng.randint(1, 4))
            ],
        }
        for k in range(count)
    ]
    told = tasks_from({"budget": budget, "allocation": method, "tasks": tasks})
    return [described(spec) for spec in told.tasks], told


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["even", "proportional", "swapnet"]))
def test_shares_sum_to_the_budget_and_nobody_is_below_its_minimum(seed: int, count: int, method: str) -> None:
    tasks, told = random_tasks(seed, count, 180 * MB, method)
    floors = [floor_bytes(task) for task in tasks]
    if sum(floors) > told.budget:
        with pytest.raises(BudgetError) as error:
            allocate(tasks, told)
        assert error.value.minimum == sum(floors)
        return
    found = allocate(tasks, told)
    assert sum(found.shares.values()) == told.budget
    for task, floor in zip(found.tasks, floors, strict=True):
        assert floor <= found.shares[task.name]
        assert floor_bytes(task) <= found.shares[task.name]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_our_allocation_is_never_slower_than_the_others(seed: int, count: int) -> None:
    tasks, told = random_tasks(seed, count, 120 * MB, "optimal")
    ours = allocate(tasks, told)
    assert sum(ours.shares.values()) == told.budget
    if memory_need(tasks, told)[1] > told.budget:
        return
    assert memory_need(ours.tasks, told)[1] <= told.budget
    for method in ("even", "proportional", "swapnet"):
        try:
            other = allocate(tasks, told.model_copy(update={"allocation": method}))
        except BudgetError:
            continue
        if admit(other.tasks, told).admitted:
            assert admit(ours.tasks, told).admitted
            assert slowdown(ours.tasks) <= slowdown(other.tasks) + 1e-9


def test_tasks_that_share_a_network_hold_its_weights_once() -> None:
    told = tasks_from(three(budget=500 * MB, allocation="optimal"))
    twin = [described(spec) for spec in (told.tasks[0], told.tasks[0].model_copy(update={"name": "twin"}))]
    shared = [CostedTask(t.spec, t.units, t.activation_bytes, network="net") for t in twin]
    found = allocate(shared, told)
    first, second = found.tasks
    assert first.pins == second.pins and first.pins
    assert memory_need(found.tasks, told)[0].pinned == first.pinned_bytes
    assert found.shares == {"t1": first.pinned_bytes, "twin": 0, "": told.budget - first.pinned_bytes}


def give_all_to_the_first(tasks: Any, told: Any) -> Allocation:
    """A policy of the user's."""
    first = tasks[0].with_pins(frozenset(tasks[0].swappable))
    return Allocation("mine", (first, *tasks[1:]), {tasks[0].name: told.budget})


def test_a_policy_of_the_users_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "mine", give_all_to_the_first)
    found = TaskSet.from_dict(three(allocation="mine")).allocation
    assert found.method == "mine" and found.tasks[0].pinned_bytes == 60 * MB
    for wrong in ("no-such", "no.such:thing", "os:sep"):
        with pytest.raises(UsageError):
            _ = TaskSet.from_dict(three(allocation=wrong)).allocation


def test_twenty_tasks_are_judged_quickly() -> None:
    """Not a benchmark: a bound that only a wrong algorithm would miss."""
    tasks, told = random_tasks(7, 20, 2000 * MB, "even")
    slow = [CostedTask(t.spec.model_copy(update={"period": 2_000_000}), t.units, t.activation_bytes) for t in tasks]
    admit(slow, told)
    start = time.perf_counter()
    admit(slow, told)
    assert time.perf_counter() - start < 2


def test_a_set_of_blocks_cannot_be_run_and_no_time_is_no_time() -> None:
    task_set = TaskSet.from_dict(three())
    with pytest.raises(UsageError, match="described by blocks"):
        task_set.run(1)
    with pytest.raises(UsageError):
        task_set.simulate(0)
    with pytest.raises(TaskSpecError):
        TaskSet.from_dict({"budget": 1})


@pytest.mark.parametrize(("compute", "holds"), [("10ms", True), ("10.0001ms", False), ("10.0004ms", False)])
def test_costs_are_never_taken_for_less_than_they_are(compute: str, holds: bool) -> None:
    told = {"budget": 1, "tasks": [{"name": "a", "period": "10ms", "blocks": [{"compute": compute}]}]}
    assert TaskSet.from_dict(told).admit().admitted is holds


def test_a_core_without_any_time_left_refuses_best_effort_in_words() -> None:
    told = {
        "budget": 1,
        "tasks": [
            {"name": "a", "period": "4ms", "blocks": [{"compute": "4ms"}]},
            {"name": "b", "period": "8ms", "blocks": [{"compute": "1ms"}], "guarantee": "best-effort"},
        ],
    }
    verdict = TaskSet.from_dict(told).admit()
    assert not verdict.admitted and "leave no time" in verdict.reasons[0]


def test_a_suggested_period_is_exact() -> None:
    blocks = [{"load": "1750us", "compute": "1500us", "bytes": 5000}]
    told: dict[str, Any] = {
        "budget": "100KB",
        "policy": "fp",
        "supply": {"share": 0.8, "delay": "2ms"},
        "tasks": [{"name": "t0", "period": "4ms", "blocks": blocks}],
    }
    said = next(s for s in TaskSet.from_dict(told).admit().suggestions if s.startswith("period: "))
    told["tasks"][0]["period"] = " ".join(said.split()[1:3]).replace(" ", "")
    assert TaskSet.from_dict(told).admit().admitted


@pytest.mark.parametrize("method", ["swapnet", "even", "proportional", "optimal"])
def test_networks_without_bytes_can_be_allocated(method: str) -> None:
    told = {"budget": 9, "allocation": method, "tasks": [{"name": "a", "period": 1, "blocks": [{"compute": 0.1}]}]}
    assert TaskSet.from_dict(told).admit().admitted
