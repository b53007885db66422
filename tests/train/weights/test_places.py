"""Places in the window: no overlap, nobody pinned goes, and those that go are needed latest."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from narrowboat.train.weights.places import PINNED, Place, Taken, find_place

HIGH = 20


@st.composite
def windows(draw: st.DrawFn) -> list[Taken]:
    cuts = sorted(draw(st.sets(st.integers(0, HIGH), max_size=10)))
    farness = st.sampled_from([PINNED, 1.0, 2.0, 5.0, 9.0, math.inf])
    return [Taken(a, b, draw(farness)) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]


def cost(taken: list[Taken], start: int, need: int) -> tuple[float, int]:
    """Larger is better."""
    gone = [each for each in taken if each.start < start + need and each.stop > start]
    return min((each.farness for each in gone), default=math.inf), -sum(each.stop - each.start for each in gone)


@given(windows(), st.integers(1, HIGH), st.integers(0, 4), st.sampled_from([-1.0, 0.0, 2.0, 7.0]))
def test_the_place_found_costs_no_more_than_any_other(taken: list[Taken], need: int, low: int, beyond: float) -> None:
    taken = [each for each in taken if each.start >= low]
    costs = [cost(taken, start, need) for start in range(low, HIGH - need + 1)]
    allowed = [each for each in costs if each[0] > beyond]
    found = find_place(taken, HIGH, need, low=low, beyond=beyond)
    if found is None:
        assert not allowed
        return
    assert cost(taken, found.start, need) == max(allowed)
    assert low <= found.start <= HIGH - need
    met = [i for i, e in enumerate(taken) if e.start < found.start + need and e.stop > found.start]
    assert met == list(range(found.first, found.last))


def test_of_holes_the_one_that_fits_best_is_taken() -> None:
    taken = [Taken(6, 8, 3.0), Taken(11, 20, 3.0)]
    assert find_place(taken, HIGH, 3) == Place(8, 1, 1)
