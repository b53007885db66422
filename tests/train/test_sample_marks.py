"""Samples are told apart by what masks, padding, lengths and weights look like."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.train.sample_marks import differing, marks, spread


def test_what_a_row_is_told_by() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 0, -1]])
    mask = torch.tensor([[1.0, 1.0], [1.0, float("nan")]])
    lengths = torch.tensor([3, 2])
    found = marks((ids, mask), lengths)
    # nothing; zeros and NaNs of each in turn; then the lengths; then the sums of the others.
    assert found.tolist() == [[0, 0, 0, 0, 0, 0, 0, 3, 6, 2], [0, 2, 0, 0, 1, 0, 0, 2, 3, 1]]
    assert differing(found).nonzero().flatten().tolist() == [1, 4, 7, 8, 9]


def test_large_rows_are_looked_at_one_by_one() -> None:
    images = torch.ones(3, 2, 800, 800)
    images[1, 0, 5] = 0
    assert marks(images, None)[:, 1].tolist() == [0, 800, 0]


def test_tensors_without_a_row_for_each_sample_tell_nothing() -> None:
    found = marks({"x": torch.ones(2, 3), "table": torch.zeros(7), "z": torch.ones(2, dtype=torch.complex64)}, None)
    assert not differing(found).any()


@given(st.lists(st.integers(1, 6), min_size=2, max_size=9), st.integers(1, 9))
def test_the_samples_chosen_are_distinct_and_reach_both_ends(lengths: list[int], samples: int) -> None:
    found = marks(torch.ones(len(lengths), 2), torch.tensor(lengths))
    chosen = spread(found, samples)
    assert len(set(chosen)) == len(chosen) == min(samples, len(lengths))
    values = [lengths[sample] for sample in chosen]
    assert values == sorted(values)
    if samples >= 2:
        assert {min(lengths), max(lengths)} <= set(values)


def test_what_matters_most_comes_first() -> None:
    found = torch.tensor([[0.0, 9, 1], [0, 1, 1], [0, 5, 7], [0, 4, 1]])
    assert spread(found, 2) == [1, 0]
    assert set(spread(found, 2, [2])) == {0, 2}
