"""Batches of any nest are cut along their samples, as views, and put together they are the batch again."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import TrainingError
from narrowboat.train.micro_batch import batch_size, cut, part_sizes, samples_in, tensors_in


class Pair(NamedTuple):
    image: torch.Tensor
    name: str


@given(samples=st.integers(1, 60), parts=st.integers(1, 70))
def test_part_sizes_are_balanced_and_whole(samples: int, parts: int) -> None:
    sizes = part_sizes(samples, parts)
    assert sum(sizes) == samples and len(sizes) == min(samples, parts)
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_pieces_put_together_are_the_batch(sizes: list[int]) -> None:
    samples = sum(sizes)
    x, ids = torch.randn(samples, 2, 3), torch.arange(samples)
    pieces = cut({"x": [x, (ids,)]}, ids, sizes)
    assert torch.equal(torch.cat([inputs["x"][0] for inputs, _ in pieces]), x)
    assert torch.equal(torch.cat([targets for _, targets in pieces]), ids)
    assert all(inputs["x"][0].untyped_storage()._cdata == x.untyped_storage()._cdata for inputs, _ in pieces)


def test_nests_keep_their_kinds_and_what_is_no_row_goes_whole() -> None:
    mask, scale = torch.ones(7, 7), torch.tensor(2.0)
    inputs: dict[str, Any] = {
        "pair": Pair(torch.randn(4, 3), "boat"),
        "kept": (mask, scale, None, 3, "text"),
        "ordered": OrderedDict(a=torch.randn(4)),
        "tokens": UserDict(ids=torch.arange(4)),
    }
    (first, _), (second, _) = cut(inputs, torch.arange(4), [1, 3])
    assert isinstance(first["pair"], Pair) and first["pair"].image.shape == (1, 3)
    assert second["kept"][0] is mask and second["kept"][1] is scale and second["kept"][2:] == (None, 3, "text")
    assert isinstance(second["ordered"], OrderedDict) and second["ordered"]["a"].shape == (3,)
    assert second["tokens"]["ids"].tolist() == [1, 2, 3]
    assert len(tensors_in(inputs)) == 5


def test_the_first_target_tells_the_batch_size_and_a_disagreement_is_an_error() -> None:
    assert batch_size((torch.zeros(7, 7), torch.zeros(3, 2)), {"y": torch.zeros(3)}) == 3
    assert batch_size(torch.zeros(5, 2)) == 5
    with pytest.raises(TrainingError, match="inputs have 4 samples in dimension 0 and targets 3"):
        batch_size(torch.zeros(4, 2), torch.zeros(3))
    with pytest.raises(TrainingError, match="no tensor with a dimension of samples"):
        batch_size("text", torch.tensor(1.0))
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 1), torch.zeros(1, 1)])
    with pytest.raises(TrainingError, match="PackedSequence"):
        cut(packed, torch.zeros(2), [1, 1])


def test_an_empty_batch_is_refused_where_it_is_to_be_trained_on() -> None:
    assert samples_in(torch.zeros(2, 3)) == 2
    with pytest.raises(TrainingError, match="empty"):
        samples_in(torch.zeros(0, 3), torch.zeros(0))
