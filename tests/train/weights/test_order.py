"""The order of touches: learnt from whole steps, and used to let go what is needed latest."""

from __future__ import annotations

import math
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from narrowboat.train.weights.order import TouchOrder

steps = st.lists(st.integers(0, 4), min_size=1, max_size=9)


def learnt(touches: list[int]) -> TouchOrder:
    order = TouchOrder()
    order.begin_step()
    for weight in touches:
        order.touch(weight)
    order.end_step()
    return order


def fewest_misses(touches: tuple[int, ...], room: int) -> int:
    """By trying every choice."""

    @cache
    def after(at: int, held: frozenset[int]) -> int:
        if at == len(touches):
            return 0
        weight = touches[at]
        if weight in held:
            return after(at + 1, held)
        kept = [held] if len(held) < room else [held - {gone} for gone in held]
        return 1 + min(after(at + 1, each | {weight}) for each in kept)

    return after(0, frozenset())


@given(steps, st.integers(1, 3))
def test_letting_go_the_farthest_reads_as_little_as_can_be(touches: list[int], room: int) -> None:
    order = learnt(touches)
    order.begin_step()
    held: set[int] = set()
    misses = 0
    for weight in touches:
        order.touch(weight)
        if weight not in held:
            misses += 1
            if len(held) == room:
                held.remove(max(held, key=order.farness))
            held.add(weight)
    assert misses == fewest_misses(tuple(touches), room)


@given(steps)
def test_a_step_like_the_one_before_is_foreseen_touch_by_touch(touches: list[int]) -> None:
    order = learnt(touches)
    order.begin_step()
    for i, weight in enumerate(touches):
        assert order.expected(0) == weight
        assert order.expected(len(touches) - i) == touches[0], "over the end of the step into the next"
        order.touch(weight)
    assert order.departures == 0


@given(steps, st.integers(0, 4))
def test_farness_counts_touches_up_to_the_next_use(touches: list[int], weight: int) -> None:
    order = learnt(touches)
    want = touches.index(weight) if weight in touches else math.inf
    assert order.farness(weight) == want


def test_before_an_order_is_known_the_longest_unused_is_farthest() -> None:
    order = TouchOrder()
    order.begin_step()
    for weight in (0, 1, 2, 0):
        order.touch(weight)
    assert sorted(range(4), key=order.farness) == [0, 2, 1, 3]


def test_a_departure_goes_on_from_where_the_order_has_the_weight() -> None:
    order = learnt([0, 1, 2, 3, 4])
    order.begin_step()
    for weight in (0, 3):
        order.touch(weight)
    assert order.departures == 1
    assert order.expected(0) == 4


def test_a_step_that_did_not_end_teaches_nothing() -> None:
    order = learnt([0, 1, 2])
    order.begin_step()
    order.touch(2)
    order.begin_step()
    assert order.known == (0, 1, 2)
    assert order.expected(0) == 0


def test_touches_between_steps_do_not_disturb_the_prediction() -> None:
    order = learnt([0, 1, 2])
    order.touch(2)
    assert order.expected(0) == 0
    assert order.departures == 0
