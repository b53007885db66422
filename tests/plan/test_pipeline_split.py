"""Where a model is cut: against every split there is, and what is said where none fits."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import PlacementError
from narrowboat.plan import Block, Machine, Workload
from narrowboat.plan.pipeline import Chain, Link, Node, Piece, Split, split
from narrowboat.plan.pipeline.choose import ENOUGH
from narrowboat.plan.pipeline.model import CALLER, link_between
from narrowboat.plan.pipeline.stage import Stage, Stages

PAGE = 4096


def piece(name: str, blocks: list[int], seconds: float, *, sends: int = 100, fixed: int = 0) -> Piece:
    """A piece of one step per block; sizes in pages."""
    made = tuple(Block(f"{name}.{i}", n * PAGE, n * PAGE, ((i, i),)) for i, n in enumerate(blocks))
    return Piece(name, Workload(made, tuple(seconds / len(blocks) for _ in blocks), fixed), 0, sends)


def by_every_split(
    chain: Chain, nodes: tuple[Node, ...], links: dict[tuple[str, str], Link], in_flight: int, *, latency: bool
) -> float | None:
    """The best cost over all orders of all nodes and all cuts."""
    table, count = Stages(chain, nodes, in_flight), len(chain.pieces)
    best = None
    for used in range(1, min(len(nodes), count) + 1):
        for order in permutations(range(len(nodes)), used):
            for inner in combinations(range(1, count), used - 1):
                cuts = [0, *inner, count]
                stages = [table.get(n, a, b) for n, a, b in zip(order, cuts, cuts[1:], strict=False)]
                if not all(isinstance(stage, Stage) for stage in stages):
                    continue
                names = [CALLER, *(nodes[n].name for n in order), CALLER]
                hops = [
                    link_between(links, a, b).hop(chain.crossing(at))
                    for a, b, at in zip(names, names[1:], cuts, strict=False)
                ]
                times = [stage.time for stage in stages if isinstance(stage, Stage)]
                if latency:
                    cost = sum(t.first for t in times) + sum(h.total for h in hops)
                else:
                    cost = max(*(t.steady for t in times), *(h.seconds for h in hops))
                best = cost if best is None else min(best, cost)
    return best


@st.composite
def cases(draw: st.DrawFn) -> tuple[Chain, tuple[Node, ...], dict[tuple[str, str], Link]]:
    sizes = st.lists(st.integers(1, 6), min_size=1, max_size=3)
    pieces = [
        piece(f"p{i}", draw(sizes), draw(st.integers(1, 50)) / 1000, sends=draw(st.integers(0, 20_000)))
        for i in range(draw(st.integers(1, 4)))
    ]
    nodes = tuple(
        Node(
            name,
            draw(st.integers(3, 30)) * PAGE + 50_000,
            Machine(bandwidth=draw(st.sampled_from([1e5, 1e6, 1e7])), read_latency=0.0),
            draw(st.sampled_from([0.5, 1.0, 2.0])),
        )
        for name in "abc"[: draw(st.integers(1, 3))]
    )
    names = [CALLER, *(node.name for node in nodes)]
    links = {
        (x, y): Link(draw(st.sampled_from([0.0, 0.01])), draw(st.sampled_from([1e6, 1e8])))
        for x in names
        for y in names
        if x != y
    }
    return Chain(tuple(pieces), draw(st.integers(0, 5000))), nodes, links


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(["throughput", "latency"]))
def test_no_split_is_better_by_more_than_the_search_lets_go(
    case: tuple[Chain, tuple[Node, ...], dict[tuple[str, str], Link]], objective: str
) -> None:
    chain, nodes, links = case
    best = by_every_split(chain, nodes, links, 3, latency=objective == "latency")
    try:
        found = split(chain, nodes, links, objective=objective, in_flight=3)
    except PlacementError:
        assert best is None
        return
    assert best is not None
    times, hops = [stage.time for stage in found.stages], found.hops
    if objective == "latency":
        cost = found.flow().latency
    else:
        cost = max(*(t.steady for t in times), *(h.seconds for h in hops))
    assert best - 1e-9 <= cost <= best * (1 + ENOUGH) * (1 + ENOUGH) + 1e-9
    covered(found, chain, nodes)


def covered(found: Split, chain: Chain, nodes: tuple[Node, ...]) -> None:
    """Every piece once, in order, each node at most once and within its bytes."""
    assert [s.begin for s in found.stages] == [0, *(s.end for s in found.stages[:-1])]
    assert found.stages[-1].end == len(chain.pieces)
    assert len({s.node for s in found.stages}) == len(found.stages)
    gives = {node.name: node.budget for node in nodes}
    for stage in found.stages:
        took = stage.plan.arena_bytes + stage.plan.fixed_bytes + stage.queue_bytes
        assert took <= gives[stage.node]


STORAGE = Machine(bandwidth=1e6, read_latency=0.0)


def test_two_nodes_hold_what_one_has_to_stream() -> None:
    chain = Chain(tuple(piece(f"p{i}", [10], 0.001) for i in range(4)), 100)
    nodes = [Node(name, 25 * PAGE, STORAGE) for name in "ab"]
    alone, together = split(chain, nodes[:1], {}), split(chain, nodes, {})
    assert alone.stages[0].plan.timing.bytes_read > 0
    assert [stage.plan.timing.bytes_read for stage in together.stages] == [0, 0]
    assert [(s.begin, s.end) for s in together.stages] == [(0, 2), (2, 4)]
    assert together.flow().period < alone.flow().period / 10


def test_a_cut_avoids_where_much_crosses() -> None:
    pieces = [piece(f"p{i}", [2], 0.01, sends=10_000_000 if i == 1 else 10) for i in range(4)]
    found = split(
        Chain(tuple(pieces), 10),
        [Node(name, 1 << 28, STORAGE) for name in "ab"],
        {("a", "b"): Link(0.001, 1e8), ("b", "a"): Link(0.001, 1e8)},
        stages=2,
    )
    assert found.stages[0].end in (1, 3)


def test_a_slow_node_gets_the_smaller_part() -> None:
    chain = Chain(tuple(piece(f"p{i}", [1], 0.01) for i in range(8)), 10)
    nodes = [Node("fast", 1 << 24, STORAGE, pace=1.0), Node("slow", 1 << 24, STORAGE, pace=3.0)]
    parts = {stage.node: stage.end - stage.begin for stage in split(chain, nodes, {}).stages}
    assert parts == {"fast": 6, "slow": 2}


def test_a_slow_link_keeps_the_model_on_one_node_where_latency_counts() -> None:
    chain = Chain(tuple(piece(f"p{i}", [1], 0.01) for i in range(4)), 10)
    nodes = [Node(name, 1 << 24, STORAGE) for name in "ab"]
    links = {(x, y): Link(1.0, 1e9) for x in "ab" for y in "ab" if x != y}
    assert len(split(chain, nodes, links, objective="latency").stages) == 1
    assert len(split(chain, nodes, links, objective="throughput").stages) == 2


def test_what_waits_in_the_queue_is_paid_by_the_budget() -> None:
    chain = Chain((piece("p0", [4], 0.01, sends=0),), 10 * PAGE)
    node = Node("a", 20 * PAGE, STORAGE)
    assert split(chain, [node], {}, in_flight=1).stages[0].queue_bytes == 0
    with pytest.raises(PlacementError):
        split(chain, [node], {}, in_flight=3)


def test_nothing_fits_and_it_says_which_node_which_layer_and_what_would_do() -> None:
    pieces = [piece("small", [2], 0.01), piece("large", [50], 0.01)]
    nodes = [Node("left", 10 * PAGE, STORAGE), Node("right", 20 * PAGE, STORAGE)]
    with pytest.raises(PlacementError, match=r"node left gives 40\.0 KiB, and large\.0 \(200 KiB\)") as caught:
        split(Chain(tuple(pieces), 10), nodes, {}, in_flight=1)
    assert set(caught.value.refusals["model"]) == {"left", "right"}
    said = int(str(caught.value).rpartition("(")[2].split()[0])
    bigger = [Node(n.name, said, STORAGE) for n in nodes]
    assert len(split(Chain(tuple(pieces), 10), bigger, {}, in_flight=1).stages) == 2
    with pytest.raises(PlacementError):
        split(Chain(tuple(pieces), 10), [Node(n.name, said - PAGE, STORAGE) for n in nodes], {}, in_flight=1)


def test_more_stages_than_nodes_are_refused() -> None:
    chain = Chain((piece("p0", [1], 0.01), piece("p1", [1], 0.01)), 10)
    with pytest.raises(PlacementError, match="3 stages were asked for"):
        split(chain, [Node("a", 1 << 20, STORAGE)], {}, stages=3)


def test_many_nodes_keep_their_order_and_still_share_the_work() -> None:
    chain = Chain(tuple(piece(f"p{i}", [1], 0.01) for i in range(16)), 10)
    nodes = tuple(Node(f"n{i}", 1 << 22, STORAGE) for i in range(8))
    found = split(chain, nodes, {})
    covered(found, chain, nodes)
    assert [stage.end - stage.begin for stage in found.stages] == [2] * 8
