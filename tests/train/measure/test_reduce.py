"""SAGE's rule for what is computed again inside a unit, and the one that follows maps as far as they go."""

from __future__ import annotations

from narrowboat.train.measure.reduce import SAGE_THRESHOLD, maps_rule, sage_rule
from narrowboat.train.tape.facts import Kind
from tape_kit import Hand

BIG = 1 << 16


def test_a_map_of_a_kept_value_is_computed_again_and_what_is_no_map_is_kept() -> None:
    hand = Hand()
    x = hand.op(makes=BIG, kind=Kind.CONTRACT)
    y = hand.op(x, makes=BIG)
    total = hand.op(y, makes=BIG, kind=Kind.REDUCE)
    picked = hand.op(y, makes=BIG, kind=Kind.OTHER)
    hand.op(total, picked, makes=BIG)
    tape = hand.tape()
    assert sage_rule(tape, {x, y, total, picked}, 0) == {y}
    assert maps_rule(tape, {x, y, total, picked}, 0) == {y}


def test_the_threshold_is_operators_times_inputs() -> None:
    assert SAGE_THRESHOLD == 5
    for length, dropped in ((5, True), (6, False)):
        hand = Hand()
        x = hand.op(makes=BIG, kind=Kind.CONTRACT)
        y = x
        for _ in range(length):
            y = hand.op(y, makes=BIG)
        hand.op(y, makes=BIG, kind=Kind.CONTRACT)
        tape = hand.tape()
        assert (sage_rule(tape, {x, y}, 0) == {y}) is dropped
        assert maps_rule(tape, {x, y}, 0) == {y}
    hand = Hand()
    sources = [hand.op(makes=BIG, kind=Kind.CONTRACT) for _ in range(3)]
    y = hand.op(hand.op(*sources, makes=BIG), makes=BIG)  # two operators of three inputs: 6
    tape = hand.tape()
    assert sage_rule(tape, {*sources, y}, 0) == frozenset()
    assert sage_rule(tape, {*sources, y}, 0, threshold=6) == {y}


def test_small_storages_and_those_of_earlier_units_are_left_alone() -> None:
    hand = Hand()
    x = hand.op(makes=BIG, kind=Kind.CONTRACT)
    early = hand.op(x, makes=BIG)
    small = hand.op(early, makes=100)
    hand.op(small, makes=BIG)
    tape = hand.tape()
    assert maps_rule(tape, {x, early, small}, 2) == frozenset()


def test_a_value_that_is_overwritten_in_place_comes_back_by_its_whole_chain() -> None:
    hand = Hand()
    x = hand.op(makes=BIG, kind=Kind.CONTRACT)
    y = hand.op(x, makes=BIG)
    hand.op(makes=None, changes=(y,))
    assert maps_rule(hand.tape(), {x, y}, 0) == {y}


def test_what_needs_a_kept_value_as_it_was_before_its_change_is_kept() -> None:
    hand = Hand()
    x = hand.op(makes=BIG, kind=Kind.CONTRACT)
    y = hand.op(x, makes=BIG)  # reads x before its change
    hand.op(makes=None, changes=(x,))
    z = hand.op(x, makes=BIG)
    tape = hand.tape()
    assert maps_rule(tape, {x, y, z}, 0) == {z}


def test_a_chain_of_dropped_values_goes_back_to_one_kept_value() -> None:
    hand = Hand()
    x = hand.op(makes=BIG, kind=Kind.CONTRACT)
    values = [x]
    for _ in range(4):
        values.append(hand.op(values[-1], makes=BIG))
    assert maps_rule(hand.tape(), set(values), 0) == set(values[1:])
