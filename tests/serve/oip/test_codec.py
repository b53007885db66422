"""Tensors to and from bytes: exactly, or not at all."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import BadRequestError
from narrowboat.serve.oip.codec import NUMPY, as_array, check_spec, from_bytes, from_values, to_json
from narrowboat.tasks.tensors import SIZES, RawTensor, TensorSpec

FLOATS = {"FP16": 16, "FP32": 32, "FP64": 64}
INTEGERS = sorted(name for name in SIZES if "INT" in name)
shapes = st.lists(st.integers(0, 3), max_size=4).map(tuple)


def nested(flat: list, shape: tuple[int, ...]) -> list:
    return np.array(flat, object).reshape(shape).tolist()


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorSpec, list]:
    datatype = draw(st.sampled_from([name for name in SIZES if name != "BF16"]))
    shape = draw(shapes)
    if datatype == "BOOL":
        element = st.booleans()
    elif datatype in FLOATS:
        element = st.floats(width=FLOATS[datatype])
    else:
        limits = np.iinfo(NUMPY[datatype])
        element = st.integers(int(limits.min), int(limits.max))
    count = math.prod(shape)
    return TensorSpec("x", datatype, shape), draw(st.lists(element, min_size=count, max_size=count))


@given(tensors(), st.booleans())
def test_numbers_that_fit_come_back_as_they_were(made: tuple[TensorSpec, list], flat: bool) -> None:
    spec, elements = made
    read = from_values(elements if flat else nested(elements, spec.shape), spec, "input 'x'")
    assert memoryview(read.data).nbytes == spec.nbytes
    back = json.loads(to_json(read))
    assert len(back) == len(elements)
    for one, other in zip(back, elements, strict=True):
        assert one == pytest.approx(other, abs=0, rel=1e-7 if spec.datatype == "FP32" else 1e-3, nan_ok=True)
    # and once more: what was written is read as the same bytes
    again = from_values(back, spec, "input 'x'")
    if not any(isinstance(each, float) and math.isnan(each) for each in back):
        assert again.data == read.data


@given(st.sampled_from(sorted(SIZES)), shapes, st.data())
def test_any_bytes_of_the_right_number_are_taken_and_written(datatype: str, shape: tuple, data: st.DataObject) -> None:
    spec = TensorSpec("x", datatype, shape)
    sent = data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
    if datatype == "BOOL" and any(each > 1 for each in sent):
        with pytest.raises(BadRequestError, match="0 or 1"):
            from_bytes(sent, spec, "input 'x'")
        return
    read = from_bytes(sent, spec, "input 'x'")
    assert read.data is sent
    told = json.loads(to_json(read))
    if not any(isinstance(each, float) and math.isnan(each) for each in told):
        assert bytes(from_values(told, spec, "input 'x'").data) == sent


@given(st.sampled_from(INTEGERS), st.integers())
def test_an_integer_is_kept_or_refused_never_wrapped(datatype: str, number: int) -> None:
    spec = TensorSpec("x", datatype, (2,))
    limits = np.iinfo(NUMPY[datatype])
    if limits.min <= number <= limits.max:
        assert as_array(from_values([0, number], spec, "x")).tolist() == [0, number]
    else:
        with pytest.raises(BadRequestError, match=r"element 1 is .* cannot hold"):
            from_values([0, number], spec, "x")


@given(st.floats(allow_nan=False, width=32))
def test_bf16_is_rounded_to_the_nearest(number: float) -> None:
    spec = TensorSpec("x", "BF16", (1,))
    try:
        (kept,) = as_array(from_values([number], spec, "x")).tolist()
    except BadRequestError:
        assert abs(number) > 3.38e38
        return
    assert kept == number or abs(kept - number) <= max(abs(number) / 256, 1e-40)


@pytest.mark.parametrize("datatype", ["FP16", "BF16", "FP32", "FP64"])
def test_nan_and_infinities_stay_what_they_are(datatype: str) -> None:
    read = from_values([math.nan, math.inf, -math.inf, 1.5], TensorSpec("x", datatype, (4,)), "x")
    assert to_json(read) == b"[NaN,Infinity,-Infinity,1.5]"


def test_each_float_is_written_with_as_many_digits_as_tell_it_apart() -> None:
    assert to_json(from_values([0.1], TensorSpec("x", "FP32", (1,)), "x")) == b"[0.1]"


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "said"),
    [
        ("UINT8", (1,), [300], "element 0 is 300, which UINT8 cannot hold"),
        ("UINT8", (1,), [-1], "element 0 is -1"),
        ("UINT64", (1,), [-1], "element 0 is -1"),
        ("UINT64", (1,), [1 << 64], "cannot hold"),
        ("INT32", (1,), [1.5], "a fraction"),
        ("INT32", (1,), [1.0], "a fraction"),
        ("INT32", (1,), [math.nan], "a fraction"),
        ("INT32", (2,), [1, True], "element 1 is true or false"),
        ("INT32", (1,), ["1"], "a text"),
        ("FP32", (1,), ["nan"], "a text"),
        ("FP32", (1,), [None], "null"),
        ("FP32", (2,), [1.0, False], "element 1"),
        ("FP32", (1,), [1e39], "which FP32 cannot hold"),
        ("FP16", (2,), [0, 65520], "element 1 is 65520, which FP16"),
        ("BF16", (1,), [3.4e38], "which BF16"),
        ("FP64", (1,), [10**400], "0..., which FP64 cannot hold"),
        ("BOOL", (1,), [1], "takes true or false"),
        ("FP32", (2,), [1.0], "1 elements, but [2] has 2"),
        ("FP32", (2,), [1.0] * 3, "3 elements"),
        ("FP32", (2,), {"0": 1}, "data has to be a list"),
        ("FP32", (2,), "12", "data has to be a list"),
        ("FP32", (2,), None, "data has to be a list"),
        ("FP32", (2, 2), [[1.0, 2.0], [3.0]], "not nested as [2, 2]"),
        ("FP32", (2, 2), [[1.0, 2.0], 3.0], "not nested"),
        ("FP32", (2, 2), [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "not nested"),
        ("FP32", (4,), [[1.0, 2.0], [3.0, 4.0]], "not nested"),
        ("FP32", (1, 2), [[[1.0], [2.0]]], "element 0 is a list"),
        ("FP32", (2,), [1.0, [2.0]], "element 1 is a list"),
        ("FP32", (), [[1.0]], "element 0 is a list"),
    ],
)
def test_what_does_not_fit_is_refused(datatype: str, shape: tuple, data: object, said: str) -> None:
    with pytest.raises(BadRequestError, match=r"^input 'x': ") as refused:
        from_values(data, TensorSpec("x", datatype, shape), "input 'x'")
    assert said in str(refused.value)


def test_a_scalar_is_a_number_or_a_list_of_one() -> None:
    spec = TensorSpec("x", "INT8", ())
    assert from_values(5, spec, "x") == from_values([5], spec, "x") == RawTensor("INT8", (), b"\x05")


@pytest.mark.parametrize(
    ("datatype", "shape", "said"),
    [
        ("FP64", [1, 8], "datatype is FP64, it takes FP32"),
        ("fp32", [1, 8], "unknown datatype 'fp32'"),
        ("BYTES", [1, 8], "unknown datatype 'BYTES'"),
        (None, [1, 8], "unknown datatype None"),
        (["FP32"], [1, 8], "unknown datatype"),
        ("FP32", [8], "shape is [8], it takes [1, 8]"),
        ("FP32", [1, -8], "shape is [1, -8]"),
        ("FP32", [1, 1 << 70], "shape is [1, 1180591620717411303424]"),
        ("FP32", [1] * 100_000, "shape is [1, 1"),
        ("FP32", [True, 8], "list of integers"),
        ("FP32", [1.0, 8], "list of integers"),
        ("FP32", "18", "list of integers"),
        ("FP32", None, "list of integers"),
    ],
)
def test_shape_and_datatype_are_the_tasks_own(datatype: object, shape: object, said: str) -> None:
    with pytest.raises(BadRequestError, match=r"^input 'x': ") as refused:
        check_spec(datatype, shape, TensorSpec("x", "FP32", (1, 8)), "input 'x'")
    assert said in str(refused.value)
    assert len(str(refused.value)) < 300


def test_bytes_of_another_number_are_refused() -> None:
    with pytest.raises(BadRequestError, match=r"31 bytes, but FP32 \[1, 8\] has 32"):
        from_bytes(bytes(31), TensorSpec("x", "FP32", (1, 8)), "x")
