"""The order of training."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import UsageError
from narrowboat.train.recipes.course import Course, held_back


@given(st.integers(1, 300), st.floats(0, 0.9), st.integers(0, 5))
def test_every_sample_is_trained_on_or_kept_back_and_never_both(samples: int, share: float, seed: int) -> None:
    rows, kept = held_back(samples, share, seed)
    assert sorted(rows + kept) == list(range(samples))
    assert rows
    assert abs(len(kept) - samples * share) <= 1


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(0, 3))
def test_an_epoch_sees_every_sample_once_but_for_a_last_one_by_itself(
    samples: int, batch: int, epochs: int, seed: int
) -> None:
    course = Course(tuple(range(100, 100 + samples)), batch, epochs, seed=seed)
    batches = list(course.batches())
    assert [number for number, _ in batches] == list(range(1, course.total + 1))
    alone = batch > 1 and samples > batch and samples % batch == 1
    for epoch in range(epochs):
        seen = [row for _, rows in batches[epoch * course.per_epoch : (epoch + 1) * course.per_epoch] for row in rows]
        assert len(seen) == len(set(seen)) == samples - alone
        assert set(seen) <= set(course.rows)


@given(st.integers(2, 40), st.integers(1, 9), st.integers(2, 30), st.data())
def test_going_on_from_any_step_gives_the_same_batches(
    samples: int, batch: int, steps: int, data: st.DataObject
) -> None:
    course = Course(tuple(range(samples)), batch, steps=steps, seed=3)
    start = data.draw(st.integers(0, steps - 1))
    assert list(course.batches(start)) == list(course.batches())[start:]


def test_epochs_are_in_different_orders() -> None:
    batches = [rows for _, rows in Course(tuple(range(50)), 50, epochs=2).batches()]
    assert batches[0] != batches[1]


def test_nothing_left_to_do_is_refused() -> None:
    with pytest.raises(UsageError, match="4 of 4 steps are made already"):
        next(Course((1, 2), 2, steps=4).batches(4))
