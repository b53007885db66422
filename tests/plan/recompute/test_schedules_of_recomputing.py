"""What a schedule takes, counted to the byte, and how it is told."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import UsageError
from narrowboat.plan.recompute import Chain, Item, Kept, Option, Schedule, Segment, Unit, evaluate
from recompute_kit import every_schedule, peak_by_sets, random_chain

KEEP = Option("keep", held=10, forward_peak=12, backward_peak=15)
HALF = Option("compact", held=5, forward_peak=12, backward_peak=15, forward_extra=0.5, backward_extra=0.25)
AWAY = Option("spill", held=3, forward_peak=12, backward_peak=15, spilled=8)


def plain_chain(count: int, *, storage: bool = False) -> Chain:
    """Equal units with boundaries of 2 bytes that share nothing."""
    unit = Unit("block", 1.0, 2.0, 1.0, (KEEP, HALF, AWAY), dropped_peak=4, gradient=3)
    carried = np.triu(np.full((count + 1, count + 1), 2), 1)
    return Chain((unit,) * count, carried, *((0.5, 0.25) if storage else (None, None)))


def test_keeping_everything_holds_everything_at_the_last_unit() -> None:
    assert evaluate(plain_chain(4), [Kept(i) for i in range(4)]) == (4 * 3.0, 3 * 10 + 15)


def test_a_segment_costs_its_forward_again_and_holds_a_boundary() -> None:
    items = (Segment(0, 3, (Kept(0), Kept(1), Kept(2))), Kept(3))
    assert evaluate(plain_chain(4), items) == (4 * 3.0 + 3.0, 2 * 10 + 15)


def test_the_gradient_that_waits_counts_in_a_replay() -> None:
    tight = Option("keep", held=1, forward_peak=12, backward_peak=1)
    unit = Unit("block", 1.0, 2.0, 1.0, (tight,), dropped_peak=4, gradient=3)
    chain = Chain((unit,) * 2, np.triu(np.full((3, 3), 2), 1))
    assert evaluate(chain, (Kept(0), Kept(1)))[1] == 1 + 12
    assert evaluate(chain, (Segment(0, 1, (Kept(0),)), Kept(1)))[1] == max(2 + 12, 12 + 3)


def test_inputs_on_storage_leave_memory_and_cost_both_ways() -> None:
    chain = plain_chain(4, storage=True)

    def items(spilled: bool) -> tuple[Item, ...]:
        return Segment(0, 1, (Kept(0),)), Segment(1, 2, (Kept(1),), spilled=spilled), Kept(2), Kept(3)

    seconds, peak = evaluate(chain, items(False))
    assert evaluate(chain, items(True)) == (seconds + 2 * 0.75, peak - 2)


def test_the_inputs_of_a_unit_on_storage_leave_memory_for_nothing_more() -> None:
    chain = plain_chain(5, storage=True)

    def items(*spilled: bool) -> tuple[Item, ...]:
        return Kept(0, 2), *(Kept(unit, 2, spilled[unit - 1]) for unit in (1, 2)), Kept(3), Kept(4)

    assert evaluate(chain, items(False, False)) == (5 * 3.0, 3 * 3 + 10 + 15)
    assert evaluate(chain, items(True, False)) == (5 * 3.0, 3 * 3 - 2 + 10 + 15)
    assert evaluate(chain, items(True, True)) == (5 * 3.0, 3 * 3 - 4 + 10 + 15)


def test_the_inputs_of_a_unit_on_storage_are_back_for_its_backward() -> None:
    chain = plain_chain(3, storage=True)
    late = Unit("late", 1.0, 2.0, 1.0, (KEEP, Option("spill", 3, 12, 100, spilled=8)), dropped_peak=4, gradient=3)
    chain = Chain((chain.units[0], late, chain.units[2]), chain.carried, chain.write, chain.read)
    assert evaluate(chain, (Kept(0, 2), Kept(1, 1, True), Kept(2)))[1] == 3 + 100


@pytest.mark.parametrize("before", [Kept(0, 2), Segment(0, 1, (Kept(0),))], ids=["a unit on storage", "a segment"])
@pytest.mark.parametrize("after", [Kept(1, 2, True), Segment(1, 2, (Kept(1),), True)], ids=["a unit", "a segment"])
def test_units_on_storage_and_segments_let_each_others_inputs_go(before: Item, after: Item) -> None:
    chain = plain_chain(4, storage=True)
    stays = replace(after, spilled=False)
    assert evaluate(chain, (before, after, Kept(2), Kept(3)))[1] == (
        evaluate(chain, (before, stays, Kept(2), Kept(3)))[1] - 2
    )


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 1), (5, 1), (2, 3), (3, 3), (4, 2)]), st.booleans(), st.integers(0, 2**32).map(Random))
def test_the_count_is_that_of_the_tensors_in_memory(size: tuple[int, int], storage: bool, random: Random) -> None:
    count, options = size
    chain, tensors = random_chain(random, count, options=options, storage=storage)
    for items in every_schedule(chain, 0, count):
        assert evaluate(chain, items)[1] == peak_by_sets(chain, tensors, items)


@pytest.mark.parametrize(
    "items",
    [
        (),
        (Kept(0), Kept(1)),
        (Kept(0), Kept(2), Kept(1)),
        (Kept(0), Segment(1, 3, (Kept(1), Kept(2)))),
        (Segment(0, 2, (Kept(0),)), Kept(2)),
        (Segment(0, 0, ()), Kept(0), Kept(1), Kept(2)),
    ],
)
def test_a_schedule_that_leaves_a_unit_out_is_refused(items: tuple[Item, ...]) -> None:
    with pytest.raises(UsageError, match="schedule of units"):
        evaluate(plain_chain(3), items)


def test_a_replay_writes_nothing_to_storage() -> None:
    with pytest.raises(UsageError, match="option spill writes to storage"):
        evaluate(plain_chain(2, storage=True), (Segment(0, 1, (Kept(0, 2),)), Kept(1)))


@pytest.mark.parametrize("away", [Kept(1, 2, True), Segment(1, 2, (Kept(1),), True)])
@pytest.mark.parametrize("storage", [True, False])
def test_inputs_that_a_kept_unit_holds_cannot_be_on_storage(storage: bool, away: Item) -> None:
    before: Item = Kept(0) if storage else Segment(0, 1, (Kept(0),))
    with pytest.raises(UsageError, match="inputs of unit 1"):
        evaluate(plain_chain(3, storage=storage), (before, away, Kept(2)))


def test_the_inputs_of_a_unit_that_writes_nothing_stay() -> None:
    with pytest.raises(UsageError, match="option compact writes nothing"):
        evaluate(plain_chain(3, storage=True), (Kept(0, 2), Kept(1, 1, True), Kept(2)))


def test_a_schedule_is_told_in_one_line() -> None:
    nested = Segment(4, 8, (Kept(4), Segment(5, 7, (Kept(5), Kept(6))), Kept(7)))
    items = (
        Kept(0),
        Kept(1),
        Kept(2, 2),
        Segment(3, 4, (Kept(3, 1),)),
        nested,
        Segment(8, 9, (Kept(8),), True),
        Kept(9, 2, True),
        Kept(10, 2),
        Kept(11, 2, True),
        Kept(12, 2, True),
        Kept(13),
    )
    assert Schedule(0.0, 0, items).describe(plain_chain(14)) == (
        "kept 0-1, spill 2, recomputed 3 (compact 3), recomputed 4-7 (kept 4, recomputed 5-6, kept 7), "
        "recomputed 8 from storage, spill 9 with its inputs, spill 10, spill 11-12 with their inputs, kept 13"
    )


def test_a_chain_that_makes_no_sense_is_refused() -> None:
    unit = Unit("block", 1.0, 2.0, 1.0, (KEEP,), dropped_peak=4, gradient=3)
    with pytest.raises(UsageError, match="at least one unit"):
        Chain((), np.zeros((1, 1), dtype=np.int64))
    with pytest.raises(UsageError, match="2 by 2 boundaries"):
        Chain((unit,), np.zeros((1, 2), dtype=np.int64))
    with pytest.raises(UsageError, match="first option"):
        Chain((Unit("block", 1.0, 2.0, 1.0, (AWAY,), 4, 3),), np.zeros((2, 2), dtype=np.int64))
