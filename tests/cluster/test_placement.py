"""First fit, the largest first, against every placement there is."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from narrowboat.cluster.placement import Fit, Placement, Wanted, place

Sets = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 10), st.booleans()), max_size=6)
Nodes = st.lists(st.integers(4, 20), min_size=1, max_size=3)


def placed(tasks: Sequence[Wanted], sizes: Sequence[int], kept: dict[str, tuple[str, ...]] | None = None) -> Placement:
    """With memory and time as what fits; tasks that are kept take a byte."""
    by_name = {task.name: task for task in tasks}
    nodes = {f"n{k}": size for k, size in enumerate(sizes)}

    async def fits(node: str, names: frozenset[str]) -> Fit:
        there = [by_name[name] for name in names if name in by_name]
        need = sum(task.nbytes for task in there) + len(names) - len(there)
        busy = sum(task.utilisation for task in there)
        if need > nodes[node]:
            return Fit(False, f"{need} of {nodes[node]} bytes")
        return Fit(busy <= 1.0001, f"{busy:.2f} of the processor")

    return asyncio.run(place(tasks, nodes, fits, kept))


def some(told: Sequence[tuple[int, int, bool]]) -> list[Wanted]:
    return [Wanted(f"t{k}", free, share / 10, size, 100 + k) for k, (size, share, free) in enumerate(told)]


@given(Sets, Nodes)
def test_no_node_is_given_more_than_it_holds_and_every_task_is_placed_once_or_refused_by_all(told, sizes) -> None:  # type: ignore[no-untyped-def]
    tasks = some(told)
    made = placed(tasks, sizes)
    by_name = {task.name: task for task in tasks}
    for node, names in made.nodes.items():
        assert sum(by_name[name].nbytes for name in names) <= sizes[int(node[1:])]
        assert sum(by_name[name].utilisation for name in names) <= 1.0001
    for task in tasks:
        assert len(made.node_of(task.name)) == (task.name not in made.refused)
    for said in made.refused.values():
        assert set(said) == {f"n{k}" for k in range(len(sizes))} and all(said.values())


@given(Sets, Nodes)
def test_what_no_placement_at_all_could_hold_is_refused(told, sizes) -> None:  # type: ignore[no-untyped-def]
    tasks = [task for task in some(told) if task.guaranteed]
    if not any(_holds(choice, tasks, sizes) for choice in itertools.product(range(len(sizes)), repeat=len(tasks))):
        assert placed(tasks, sizes).refused


def _holds(choice: Sequence[int], tasks: Sequence[Wanted], sizes: Sequence[int]) -> bool:
    for node, size in enumerate(sizes):
        there = [task for task, on in zip(tasks, choice, strict=True) if on == node]
        if sum(task.nbytes for task in there) > size or sum(task.utilisation for task in there) > 1.0001:
            return False
    return True


def test_almost_everything_that_could_be_placed_is_placed() -> None:
    hits = misses = 0
    for told in itertools.product([2, 3, 5, 7], repeat=4):
        tasks = some([(size, 1, True) for size in told])
        if any(_holds(c, tasks, [9, 9]) for c in itertools.product(range(2), repeat=4)):
            refused = bool(placed(tasks, [9, 9]).refused)
            hits, misses = hits + (not refused), misses + refused
    assert misses <= 0.03 * hits, (hits, misses)


def test_promises_come_first() -> None:
    tasks = [Wanted("free", False, 0.1, 9), Wanted("small", True, 0.1, 2)]
    made = placed(tasks, [10])
    assert made.nodes == {"n0": ("small",)} and list(made.refused) == ["free"]


def test_what_promises_nothing_goes_where_the_fewest_run() -> None:
    tasks = [Wanted(f"f{k}", False, 0.1, 2) for k in range(3)]
    made = placed(tasks, [10, 10, 10])
    assert sorted(len(names) for names in made.nodes.values()) == [1, 1, 1]


def test_what_runs_stays_where_it_is() -> None:
    made = placed([Wanted("new", True, 0.1, 3)], [4, 4], {"n0": ("old", "older"), "n1": ()})
    assert made.nodes == {"n0": ("old", "older"), "n1": ("new",)}


def test_another_order_is_tried_where_the_largest_first_fails() -> None:
    """By what they take most, the first two would share a node, with nothing left for the others."""
    tasks = [
        Wanted("wide", True, 0.5, 6),
        Wanted("busy", True, 0.7, 3),
        Wanted("c", True, 0.5, 4),
        Wanted("d", True, 0.3, 7),
    ]
    assert not placed(tasks, [10, 10]).refused


def test_without_nodes_everything_is_refused_with_a_reason() -> None:
    assert placed([Wanted("a")], []).refused == {"a": {"": "there is no node"}}
