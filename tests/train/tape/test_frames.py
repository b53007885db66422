"""A schedule compiled for a tape: what is held, what is dropped, what runs when."""

from __future__ import annotations

from narrowboat.plan.recompute import Kept, Segment
from narrowboat.train.tape.frames import Fill, Treatment, UnitOption, compile_plan
from tape_kit import Hand, layers

KEEP = (UnitOption("keep"),)


def test_keeping_everything_needs_no_frame() -> None:
    tape = layers(3)
    plan = compile_plan(tape, (0, 2, 4), [KEEP, KEEP], [Kept(0), Kept(1)])
    assert plan.frames == [] and plan.encode == frozenset() and plan.captures == {}
    assert plan.frame_of_unit == [-1, -1]
    assert {treatment for treatment, _ in plan.treatments.values()} == {Treatment.KEEP}


def test_a_segment_holds_its_inputs_and_fills_what_its_units_saved() -> None:
    tape = layers(4)  # storages 0 to 4, of which 0 to 3 are saved by the operators 1 to 4
    plan = compile_plan(tape, (0, 2, 4, 5), [KEEP] * 3, [Kept(0), Segment(1, 2, (Kept(1),)), Kept(2)])
    (frame,) = plan.frames
    assert (frame.start, frame.stop, frame.program.inputs) == (1, 2, {1})
    assert frame.program.ops == (2,)  # storage 3, the input of the last unit, is saved and kept there
    assert set(frame.fills) == {Fill(1, 1), Fill(2, 1)}
    assert plan.captures == {1: (0,)}
    assert plan.treatments[(1, 2)] == (Treatment.DROP, 1)
    assert plan.treatments[(3, 4)] == (Treatment.KEEP, 2)
    assert plan.frame_of_unit == [-1, 0, -1]


def test_an_inner_segment_begins_with_what_the_outer_replay_leaves() -> None:
    tape = layers(4)
    items = [Segment(0, 3, (Kept(0), Segment(1, 2, (Kept(1),)), Kept(2))), Kept(3)]
    plan = compile_plan(tape, (0, 2, 3, 4, 5), [KEEP] * 4, items)
    inner, outer = plan.frames
    assert plan.frame_of_unit == [outer.index] * 3 + [-1]
    assert outer.inner == (inner.index,)
    assert inner.program.inputs == {1}
    # Unit 1 saved storage 1: it comes with the inner frame. Storages of units 0 and 2 come with the outer one.
    assert {fill.number for fill in outer.fills} == {0, 2}
    assert outer.program.ops == (0, 1, 2)
    assert 1 not in {number for frees in outer.program.frees for number in frees}
    assert plan.encode == {0, 1, 2}


def test_a_reduced_unit_replays_from_what_it_keeps() -> None:
    hand = Hand()
    x = hand.op()
    y = hand.op(x)
    hand.save(y)
    z = hand.op(y)
    hand.save(z)
    hand.op(z)
    options = (UnitOption("keep"), UnitOption("reduced", dropped=frozenset({z})))
    plan = compile_plan(hand.tape(), (0, 4), [options], [Kept(0, 1)])
    (frame,) = plan.frames
    assert frame.program.ops == (2,) and frame.program.inputs == {y}
    assert plan.treatments[(y, 2)][0] is Treatment.KEEP
    assert plan.treatments[(z, 3)][0] is Treatment.DROP


def test_compact_and_spill_are_told_apart_and_compact_carries_into_a_replay() -> None:
    tape = layers(3)
    options = (
        UnitOption("keep"),
        UnitOption("compact", compact=frozenset({0, 1})),
        UnitOption("spill", spilled=frozenset({0, 1})),
    )
    cuts = (0, 3, 4)
    compacted = compile_plan(tape, cuts, [options, KEEP], [Kept(0, 1), Kept(1)])
    spilled = compile_plan(tape, cuts, [options, KEEP], [Kept(0, 2), Kept(1)])
    replayed = compile_plan(tape, cuts, [options, KEEP], [Segment(0, 1, (Kept(0, 1),), spilled=True), Kept(1)])
    assert compacted.treatments[(0, 1)] == (Treatment.COMPACT, 0)
    assert spilled.treatments[(0, 1)] == (Treatment.SPILL, 0)
    assert replayed.treatments[(0, 1)] == (Treatment.DROP, 0)
    assert replayed.frames[0].fills == (Fill(0, 0, True), Fill(1, 0, True)) and replayed.frames[0].spilled


def test_one_storage_saved_in_two_units_counts_to_each() -> None:
    hand = Hand()
    x = hand.op()
    for _ in range(2):
        hand.save(x)
        hand.op(x)
    plan = compile_plan(hand.tape(), (0, 2, 3), [KEEP, KEEP], [Segment(0, 1, (Kept(0),)), Kept(1)])
    assert plan.treatments[(x, 1)] == (Treatment.DROP, 0)
    assert plan.treatments[(x, 2)] == (Treatment.KEEP, 1)
