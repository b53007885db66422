"""Which operators bring a storage back: chains in place, what is there already, what has to be refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.train.tape.slices import (
    SliceConflictError,
    boundary,
    cut_is_valid,
    home,
    last_reads,
    needed_across,
    program,
)
from narrowboat.train.tape.structure import Tape
from tape_kit import Hand, layers


def test_only_what_leads_to_the_target_runs_and_is_freed_in_time() -> None:
    hand = Hand()
    x = hand.op(makes=10)
    a = hand.op(x, makes=20)
    b = hand.op(a, makes=30)
    hand.op(x, makes=40)  # no part of it
    c = hand.op(b, makes=50)
    made = program(hand.tape(), [c], 1)
    assert made.ops == (1, 2, 4)
    assert made.inputs == {x}
    assert made.frees == ((), (a,), (b,))
    assert made.peak == 30 + 50
    assert made.seconds == 3


def test_a_storage_comes_back_with_all_that_was_written_to_it() -> None:
    hand = Hand()
    x = hand.op()
    y = hand.op(x)
    other = hand.op()
    hand.op(other, makes=None, changes=(y,))  # y += other
    hand.op(makes=None, changes=(y,))  # relu_(y)
    tape = hand.tape()
    assert program(tape, [y], 0).ops == (0, 1, 2, 3, 4)
    assert program(tape, [y], 1).inputs == {x}
    assert program(tape, [y], 1, kept=frozenset({other})).ops == (1, 3, 4)


def test_what_was_read_before_a_change_is_not_read_from_a_kept_storage() -> None:
    hand = Hand()
    x = hand.op()
    y = hand.op(x)
    before = hand.op(y)
    hand.op(makes=None, changes=(y,))
    after = hand.op(y)
    tape = hand.tape()
    with pytest.raises(SliceConflictError) as conflict:
        program(tape, [before], 0, kept=frozenset({y}))
    assert conflict.value.number == y
    assert program(tape, [after], 0, kept=frozenset({y})).ops == (4,)
    assert program(tape, [before], 0).ops == (0, 1, 2)


def test_spare_storages_stay_and_bring_their_own_operators() -> None:
    hand = Hand()
    x = hand.op()
    a = hand.op(x)
    b = hand.op(a)
    c = hand.op(x)
    made = program(hand.tape(), [b], 1, spare=frozenset({a, c, x}))
    assert made.ops == (1, 2, 3)
    assert made.inputs == {x}
    assert {number for frees in made.frees for number in frees} == set()


def test_a_target_that_is_there_already_is_an_input() -> None:
    tape = layers(3)
    made = program(tape, [1], 3)
    assert (made.ops, made.inputs, made.peak) == ((), {1}, 0)


def test_no_cut_between_a_storage_and_its_last_change() -> None:
    hand = Hand()
    x = hand.op()
    hand.op(x)
    hand.op(makes=None, changes=(x,))
    hand.op(x)
    assert cut_is_valid(hand.tape()) == [True, False, False, True, True]


def test_results_count_to_the_operator_that_made_them_and_arguments_to_the_one_that_reads_them() -> None:
    hand = Hand()
    x = hand.op()
    hand.save(x)  # an argument of the next
    y = hand.op(x)
    hand.save(y)  # the result of the last, read by none
    hand.op(x)
    hand.save(x)  # after its last reading, long after it was made: the end of the pass
    tape = hand.tape()
    last = last_reads(tape)
    assert last == [2, -1, -1]
    assert home(tape, x, 1, last) == 1
    assert home(tape, y, 2, last) == 1
    assert home(tape, x, 3, last) == 2


def test_boundaries_hold_what_later_operators_read_or_save() -> None:
    hand = Hand()
    x = hand.op()
    y = hand.op(x)
    hand.op(y)
    hand.save(x)
    hand.op(y)
    tape = hand.tape()
    needed = needed_across(tape, last_reads(tape))
    assert [boundary(tape, place, needed) for place in range(5)] == [set(), {x}, {x, y}, {x, y}, set()]


@st.composite
def tapes(draw: Any) -> Tape:
    """Anything goes, changes in place included."""
    hand = Hand()
    hand.op(makes=draw(st.integers(1, 9)))
    for _ in range(draw(st.integers(1, 12))):
        there = st.integers(0, len(hand.storages) - 1)
        reads = draw(st.lists(there, max_size=3))
        changes = tuple(draw(st.lists(there, max_size=1)))
        makes = None if changes and draw(st.booleans()) else draw(st.integers(1, 9))
        hand.op(*reads, makes=makes, changes=changes)
    return hand.tape()


Values = dict[int, tuple[Any, ...]]


def run(tape: Tape, ops: Iterable[int], values: Values) -> None:
    """Carry operators out on words instead of numbers: each value says how it came about."""
    for index in ops:
        op = tape.ops[index]
        read = tuple(values[number] for number in op.read)
        for number in op.changed:
            values[number] = ("changed", index, number, read)
        for number in op.created:
            values[number] = ("made", index, read)


@settings(max_examples=60, deadline=None)
@given(tapes(), st.data())
def test_a_replay_from_any_valid_cut_gives_the_values_of_the_pass(tape: Tape, data: st.DataObject) -> None:
    cuts = [place for place, valid in enumerate(cut_is_valid(tape)) if valid and place < len(tape.ops)]
    start = data.draw(st.sampled_from(cuts))
    numbers = st.sets(st.integers(0, len(tape.storages) - 1))
    targets, spare, kept = data.draw(numbers), frozenset(data.draw(numbers)), frozenset(data.draw(numbers))
    final: Values = {}
    run(tape, range(len(tape.ops)), final)
    try:
        made = program(tape, targets, start, kept=kept, spare=spare)
    except SliceConflictError as conflict:
        assert conflict.number in kept
        return
    assert all(tape.storages[n].creator < start or n in kept for n in made.inputs)
    # Inputs are there as they are at the end of the pass, which is how frames hold them.
    values = {number: final[number] for number in made.inputs}
    for index, frees in zip(made.ops, made.frees, strict=True):
        run(tape, [index], values)
        values.update((number, final[number]) for number in made.inputs)  # which stay as they are held
        for number in frees:
            del values[number]
    for number in targets | spare:
        assert values[number] == final[number]
