"""Grouping weights into blocks: every weight has its place, apart from the others and aligned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.arena.slot import Weight
from narrowboat.checkpoint import TensorEntry
from narrowboat.profile.use_trace import UseTrace
from narrowboat.profile.workload import ALIGN, PAGE, TARGET, Group, form_groups, use_intervals


def make_weights(sizes: list[int]) -> list[Weight]:
    weights, offset = [], 0
    for i, size in enumerate(sizes):
        weights.append(
            Weight(i, f"layer{i}.weight", TensorEntry(f"w{i}", torch.uint8, (size,), size, Path("w"), offset))
        )
        offset += -(-size // PAGE) * PAGE
    return weights


def make_trace(uses: list[list[int]], holds: list[tuple[int, int, int]] | None = None) -> UseTrace:
    trace = UseTrace(holds=holds or [])
    for step, used in enumerate(uses):
        trace.open_step((step, 0))
        for weight in used:
            trace.use(weight)
    return trace


SIZES = st.lists(st.sampled_from([0, 4, 100, 4096, 5000, 70_000, 300_000, 900_000]), min_size=1, max_size=15)


@given(SIZES, st.data(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_weight_has_one_place_in_a_block_that_holds_it_when_it_is_used(
    sizes: list[int], data: st.DataObject, packed: bool
) -> None:
    weights = make_weights(sizes)
    uses = data.draw(st.lists(st.lists(st.integers(0, len(sizes) - 1), max_size=4), min_size=1, max_size=20))
    holds = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(sizes) - 1), st.integers(0, len(uses) - 1), st.just(len(uses) - 1)),
            max_size=3,
        )
    )
    used = {w for step in uses for w in step}
    trace = make_trace(uses, [hold for hold in holds if hold[0] in used])
    groups = form_groups(trace, weights, packed=packed)
    placed = [w for group in groups for w in group.weights]
    assert sorted(placed) == [w for w, size in enumerate(sizes) if size]
    needed = use_intervals(trace, len(weights))
    for group in groups:
        assert_laid_out(group, weights, PAGE if packed else ALIGN)
        for w in group.weights:
            for first, last in needed[w]:
                assert any(f <= first and last <= s for f, s in group.block.holds)
        for (_, last), (first, _) in zip(group.block.holds, group.block.holds[1:], strict=False):
            assert last < first
    starts = [group.block.holds[0][0] for group in groups if group.block.holds]
    assert starts == sorted(starts)


def assert_laid_out(group: Group, weights: list[Weight], unit: int) -> None:
    at = 0
    for w, place in zip(group.weights, group.places, strict=True):
        assert place % unit == 0
        assert place >= at
        at = place + weights[w].entry.nbytes
    assert at <= group.block.nbytes
    assert group.block.nbytes % PAGE == 0
    assert group.block.read_bytes <= group.block.nbytes


def test_intervals_join_where_they_touch_and_views_stretch_them() -> None:
    trace = make_trace([[0], [0], [1], [0], []], holds=[(1, 2, 4)])
    assert use_intervals(trace, 2) == [[(0, 1), (3, 3)], [(2, 4)]]


def test_small_neighbours_share_a_block_and_large_ones_do_not() -> None:
    weights = make_weights([300_000, 1000, 300_000, 1000, 1000])
    groups = form_groups(make_trace([[0, 1], [2, 3], [4]]), weights, packed=True)
    assert [group.weights for group in groups] == [(0, 1), (2, 3, 4)]
    assert all(sum(weights[w].entry.nbytes for w in group.weights) <= TARGET for group in groups)


def test_a_weight_used_again_later_keeps_to_itself() -> None:
    weights = make_weights([1000, 1000, 1000])
    groups = form_groups(make_trace([[0], [1], [2], [], [1]]), weights, packed=True)
    assert (1,) in [group.weights for group in groups]


def test_what_is_never_used_comes_last_and_is_never_needed() -> None:
    weights = make_weights([1000, 1000])
    groups = form_groups(make_trace([[1]]), weights, packed=True)
    assert [(group.weights, group.block.holds) for group in groups] == [((1,), ((0, 0),)), ((0,), ())]


def test_what_the_pass_writes_is_held_throughout() -> None:
    trace = make_trace([[0], [1], [0]])
    trace.written.add(1)
    groups = form_groups(trace, make_weights([300_000, 300_000]), packed=True)
    held = {group.weights: group.block.holds for group in groups}
    assert held[(1,)] == ((0, 2),)


@pytest.mark.parametrize("packed", [True, False])
def test_blocks_are_named_by_their_largest_layer(packed: bool) -> None:
    groups = form_groups(make_trace([[0, 1]]), make_weights([10, 2000]), packed=packed)
    assert [group.block.name for group in groups] == ["layer1"]
