"""Slots never overlap, and what is freed can be taken again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.train.spill_slots import PAGE, Slots, rounded


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 99)), max_size=60))
def test_slots_never_overlap_and_holes_join(steps: list[tuple[bool, int, int]]) -> None:
    slots, taken = Slots(), list[tuple[int, int]]()
    for take, pages, which in steps:
        if take or not taken:
            size = pages * PAGE
            before = slots.end
            slots.grow(slots.missing(size))
            offset = slots.take(size)
            assert offset >= 0 and offset + size <= slots.end <= before + size
            assert size == 0 or all(offset + size <= at or at + length <= offset for at, length in taken if length)
            taken.append((offset, size))
        else:
            slots.give(*taken.pop(which % len(taken)))
        assert slots.taken == sum(size for _, size in taken)
    for slot in taken:
        slots.give(*slot)
    assert slots.taken == 0
    assert slots.missing(slots.end) == 0, "all that is free is one hole"


def test_the_smallest_hole_that_fits_is_taken() -> None:
    slots = Slots()
    slots.grow(10 * PAGE)
    large, _, small, _ = (slots.take(size * PAGE) for size in (4, 1, 2, 3))
    slots.give(large, 4 * PAGE)
    slots.give(small, 2 * PAGE)
    assert slots.take(2 * PAGE) == small
    assert slots.take(PAGE) == large


def test_the_file_grows_only_by_what_its_last_hole_lacks() -> None:
    slots = Slots()
    slots.grow(3 * PAGE)
    slots.take(PAGE)
    assert slots.missing(5 * PAGE) == 3 * PAGE


def test_without_a_hole_nothing_is_given() -> None:
    with pytest.raises(ValueError, match="no hole"):
        Slots().take(PAGE)


def test_sizes_are_whole_pages() -> None:
    assert [rounded(nbytes) for nbytes in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]
