"""Compacted tensors come back bit for bit, or are not compacted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from narrowboat.train.tape.compact import compact

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int64, torch.int32, torch.int16]
# Lengths about the pieces and bytes in which bits are looked at.
LENGTHS = st.one_of(st.integers(0, 40), st.sampled_from([4095, 4096, 4097, (1 << 12) + (1 << 16) + 3]))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape, strides and bit patterns are the same."""
    raw = [bytes(each.contiguous().reshape(-1).view(torch.uint8).numpy()) for each in (one, other)]
    return (one.dtype, one.shape, one.stride(), raw[0]) == (other.dtype, other.shape, other.stride(), raw[1])


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from([torch.bool, *FLOATS, *INTEGERS, torch.uint8]), st.data())
def test_two_values_of_any_dtype_become_bits(length: int, dtype: torch.dtype, data: st.DataObject) -> None:
    numbers = [0.0, 1.0] if dtype in (torch.bool, torch.uint8, *INTEGERS) else [0.0, -0.0, 1 / 0.9, float("nan"), 3e-5]
    pair = data.draw(st.lists(st.sampled_from(numbers), min_size=2, max_size=2))
    mask = torch.from_numpy(np.random.default_rng(data.draw(st.integers(0, 99))).random(length) < 0.5)
    low, high = (torch.tensor(number, dtype=dtype) for number in pair)
    tensor = torch.where(mask, high, low)
    compacted = compact(tensor)
    if compacted is None:
        assert -(-length // 8) >= tensor.nbytes or length == 0
    else:
        assert compacted.nbytes == -(-length // 8) < tensor.nbytes
        assert same(compacted.restore(), tensor)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12), st.integers(0, 63), st.sampled_from(INTEGERS))
def test_integers_become_the_smallest_that_hold_them(numbers: list[int], shift: int, dtype: torch.dtype) -> None:
    tensor = torch.tensor([number >> shift for number in numbers], dtype=torch.int64).to(dtype)
    compacted = compact(tensor, "ints")
    if compacted is None:
        if len(tensor):
            half = torch.iinfo(dtype).bits // 2
            least, largest = int(tensor.min()), int(tensor.max())
            assert not (least >= 0 and largest < 2**half)
            assert not (-(2 ** (half - 1)) <= least and largest < 2 ** (half - 1))
    else:
        assert compacted.nbytes < tensor.nbytes
        assert same(compacted.restore(), tensor)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf")]), max_size=20))
def test_whatever_is_compacted_comes_back(numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32)
    compacted = compact(tensor)
    distinct = len(set(tensor.view(torch.int32).tolist()))
    assert (compacted is not None) == (0 < distinct <= 2)
    assert compacted is None or same(compacted.restore(), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_tensor_of_no_dimensions_comes_back(dtype: torch.dtype) -> None:
    tensor = torch.tensor(7, dtype=dtype)
    compacted = compact(tensor)
    assert compacted is not None and compacted.nbytes == 1
    assert same(compacted.restore(), tensor)


def test_two_nans_of_different_bits_are_two_values() -> None:
    words = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FC00001], dtype=torch.int32)
    compacted = compact(words.view(torch.float32))
    assert compacted is not None
    assert compacted.restore().view(torch.int32).tolist() == words.tolist()


def test_a_third_value_far_in_is_seen() -> None:
    tensor = torch.zeros(200_001)
    tensor[100_000] = 1.25
    assert compact(tensor) is not None
    tensor[200_000] = -0.0
    assert compact(tensor) is None


def test_bools_whose_bytes_are_neither_0_nor_1_are_not_changed() -> None:
    odd = torch.tensor([0, 2, 2, 0, 2, 0, 0, 2, 2], dtype=torch.uint8).view(torch.bool)
    compacted = compact(odd)
    assert compacted is not None
    assert compacted.restore().view(torch.uint8).tolist() == odd.view(torch.uint8).tolist()
    assert compact(torch.tensor([0, 1, 2] * 5, dtype=torch.uint8).view(torch.bool)) is None


def test_dropout_noise_takes_a_thirty_second() -> None:
    noise = torch.empty(64, 100).bernoulli_(0.9).div_(0.9)
    compacted = compact(noise, "bits")
    assert compacted is not None and compacted.nbytes * 32 == noise.nbytes
    assert same(compacted.restore(), noise)


def test_max_pool_indices_take_a_quarter() -> None:
    _, indices = torch.nn.functional.max_pool2d(torch.randn(2, 3, 64, 64), 2, return_indices=True)
    compacted = compact(indices)
    assert compacted is not None and compacted.nbytes * 4 == indices.nbytes
    assert same(compacted.restore(), indices)


def test_strides_are_kept() -> None:
    mask = torch.rand(2, 3, 8, 5) < 0.5
    for tensor in (mask.contiguous(memory_format=torch.channels_last), mask.permute(3, 1, 0, 2), mask[:, :1]):
        compacted = compact(tensor)
        if tensor.shape[1] == 1:
            assert compacted is None  # a part of its memory: between its elements lie others
        else:
            assert compacted is not None and same(compacted.restore(), tensor)
            assert compacted.restore().stride() == tensor.stride()


def test_what_has_no_memory_of_its_own_is_left_alone() -> None:
    assert compact(torch.zeros(1).expand(64)) is None
    assert compact(torch.zeros(64, device="meta")) is None
    assert compact(torch.zeros(64, dtype=torch.complex64).conj()) is None
    assert compact(torch.eye(4).to_sparse()) is None


def test_a_hint_looks_for_one_thing_only() -> None:
    counted = torch.arange(300)
    assert compact(counted, "bits") is None
    assert compact(torch.randn(64).relu_(), "ints") is None
    ints = compact(counted % 2, "ints")
    assert ints is not None and ints.kind == "ints"


def test_the_original_may_change_afterwards() -> None:
    tensor = torch.arange(64) % 3
    was = tensor.clone()
    compacted = compact(tensor)
    tensor.fill_(0)
    assert compacted is not None and torch.equal(compacted.restore(), was)


def test_no_operator_is_called_to_compact() -> None:
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            raise AssertionError(f"{func} was called")

    mask, indices = torch.rand(99) < 0.5, torch.arange(99)
    with Refuse():
        assert compact(mask) is not None
        assert compact(indices) is not None
