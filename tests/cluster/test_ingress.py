"""What the way to a node costs a promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.cluster.ingress import allowance, bucket_of, on_node, tasks_on_node
from narrowboat.tasks.costed import arrival_of
from narrowboat.tasks.spec.load import tasks_from
from narrowboat.tasks.spec.schema import TaskSpec


def spec(**fields: object) -> TaskSpec:
    told = {"name": "t", "model": "zoo:resnet18", "weights": "w", "input": {"queue": "q"}, **fields}
    return tasks_from({"budget": "1GiB", "tasks": [told]}).tasks[0]


@given(st.integers(1, 5), st.integers(1, 200), st.integers(1, 300), st.integers(1, 2000))
def test_the_node_is_ready_for_every_arrival_that_jitter_can_make(
    burst: int, period: int, allowed: int, length: int
) -> None:
    asked = spec(contract={"burst": burst, "period": f"{period}ms"}, deadline=f"{burst * period}ms")
    kept = on_node(asked, allowed * 1000)
    if kept is None:
        assert allowed >= burst * period
        return
    # At the door at most eta(d) come in any time d; on the node what came in d + A may come in d.
    assert arrival_of(kept).eta(length * 1000) >= arrival_of(asked).eta((length + allowed) * 1000)
    assert kept.relative_deadline == asked.relative_deadline - allowed * 1000


@given(st.integers(1, 200), st.integers(0, 50), st.integers(1, 100), st.integers(1, 2000))
def test_a_period_gains_jitter(period: int, jitter: int, allowed: int, length: int) -> None:
    asked = spec(period=f"{period}ms", jitter=f"{jitter}ms")
    kept = on_node(asked, allowed * 1000)
    if kept is not None:
        assert arrival_of(kept).eta(length * 1000) >= arrival_of(asked).eta((length + allowed) * 1000)


def test_a_task_that_takes_its_inputs_itself_is_as_it_was() -> None:
    asked = spec(input={"generator": "example"}, period="100ms")
    assert on_node(asked, 50_000) is asked
    assert bucket_of(asked) is None


def test_a_deadline_shorter_than_the_way_is_refused_by_name() -> None:
    told = {"name": "t", "model": "zoo:resnet18", "weights": "w", "input": {"queue": "q"}, "period": "5ms"}
    settings, late = tasks_on_node(tasks_from({"budget": "1GiB", "tasks": [told]}), 8000)
    assert not settings.tasks
    assert "deadline of 5 ms is over before a node is reached" in late["t"]


def test_the_door_holds_clients_to_what_was_described_and_not_to_the_node_s_wider_contract() -> None:
    asked = spec(contract={"burst": 2, "period": "10ms"}, deadline="20ms")
    door = bucket_of(asked)
    assert door is not None
    door.take(0)
    door.take(0)
    assert door.wait(0) == 10_000


def test_nobody_is_held_up_where_nothing_is_promised() -> None:
    assert bucket_of(spec(period="10ms", guarantee="best-effort")) is None


@pytest.mark.parametrize(("ways", "allowed"), [([0.004, 0.001], 8000), ([], 1000), ([1e-6], 1000)])
def test_the_longest_way_with_a_margin_and_never_below_a_millisecond(ways: list[float], allowed: int) -> None:
    assert allowance(ways) == allowed
