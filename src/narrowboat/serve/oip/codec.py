"""Tensors of the protocol, to and from bytes. Strict: what its datatype cannot hold is refused, never wrapped.

Pure functions; nothing here knows HTTP or gRPC. Every refusal is a ``BadRequestError`` that says where and what.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson

from narrowboat.errors import BadRequestError
from narrowboat.tasks.tensors import SIZES, Buffer, RawTensor, TensorSpec

NUMPY: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}  # BF16 has none: it is the upper half of a float32
_INTEGER = frozenset(name for name in SIZES if "INT" in name)
_KINDS = {
    bool: "true or false",
    str: "a text",
    type(None): "null",
    list: "a list",
    dict: "an object",
    float: "a fraction",
}
_LONGEST_SHAPE = 32


def check_spec(datatype: Any, shape: Any, spec: TensorSpec, where: str) -> None:
    """What a client says of a tensor has to be what the task takes.

    Args:
        datatype: as it came.
        shape: as it came.
        spec: of the task.
        where: what to call the tensor.

    Raises:
        BadRequestError: unknown or other datatype; a shape that is none, or another.
    """
    if datatype != spec.datatype:
        if not isinstance(datatype, str) or datatype not in SIZES:
            raise BadRequestError(f"{where}: unknown datatype {_brief(datatype)}; it takes {spec.datatype}")
        raise BadRequestError(f"{where}: datatype is {datatype}, it takes {spec.datatype}")
    if not isinstance(shape, list | tuple) or any(type(size) is not int for size in shape[: _LONGEST_SHAPE + 1]):
        raise BadRequestError(f"{where}: shape has to be a list of integers, not {_brief(shape)}")
    if tuple(shape) != spec.shape:
        raise BadRequestError(f"{where}: shape is {_brief(list(shape))}, it takes {list(spec.shape)}")


def from_values(data: Any, spec: TensorSpec, where: str) -> RawTensor:
    """A tensor of numbers as JSON has them: a flat list, or lists nested as the shape says.

    Args:
        data: the numbers; true and false for BOOL, integers for integer types, any numbers for the others.
        spec: what the tensor has to be.
        where: what to call it.

    Raises:
        BadRequestError: another count, lists of other lengths, elements of other kinds or out of range.
    """
    flat = _flat(data, spec.shape, where)
    if spec.datatype == "BOOL":
        _only(flat, (bool,), "true or false", spec, where)
        return RawTensor(spec.datatype, spec.shape, np.array(flat, "?").tobytes())
    if spec.datatype in _INTEGER:
        _only(flat, (int,), "integers", spec, where)
        return RawTensor(spec.datatype, spec.shape, _integers(flat, spec, where).tobytes())
    _only(flat, (float, int), "numbers", spec, where)
    return RawTensor(spec.datatype, spec.shape, _floats(flat, spec, where).tobytes())


def from_bytes(data: Buffer, spec: TensorSpec, where: str) -> RawTensor:
    """A tensor of its bytes, which are not copied.

    Raises:
        BadRequestError: another number of bytes; a BOOL that is neither 0 nor 1.
    """
    given = len(data)
    if given != spec.nbytes:
        raise BadRequestError(
            f"{where}: {given} bytes, but {spec.datatype} {list(spec.shape)} has {spec.nbytes}",
            details={"given": given},
        )
    if spec.datatype == "BOOL" and given and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise BadRequestError(f"{where}: a byte of BOOL is 0 or 1")
    return RawTensor(spec.datatype, spec.shape, data)


def to_json(tensor: RawTensor) -> bytes:
    """The numbers of a tensor as a flat JSON list, each with as many digits as tell it apart.

    NaN and infinities, for which JSON has no words, are written as Triton and Python's ``json`` write them
    (``NaN``, ``Infinity``): a client that cannot read them fails, rather than takes them for something else.
    """
    array = as_array(tensor)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return json.dumps(array.tolist(), separators=(",", ":")).encode()
    return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)


def as_array(tensor: RawTensor) -> np.ndarray:
    """The elements as a flat array over the same bytes; BF16 widened to float32."""
    if tensor.datatype == "BF16":
        return (np.frombuffer(tensor.data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(tensor.data, NUMPY[tensor.datatype])


def _flat(data: Any, shape: Sequence[int], where: str) -> list[Any]:
    count = 1
    for size in shape:
        count *= size
    if type(data) is not list:
        if not shape and data is not None:
            return [data]
        raise BadRequestError(f"{where}: data has to be a list, not {_brief(data)}")
    if data and type(data[0]) is list and shape:
        level = [data]
        for size in shape:
            if any(type(part) is not list or len(part) != size for part in level):
                raise BadRequestError(f"{where}: the lists of data are not nested as {list(shape)}")
            level = list(chain.from_iterable(level))
        return level
    if len(data) != count:
        raise BadRequestError(f"{where}: {len(data)} elements, but {list(shape)} has {count}")
    return data


def _only(flat: list[Any], kinds: tuple[type, ...], words: str, spec: TensorSpec, where: str) -> None:
    if set(map(type, flat)) <= set(kinds):
        return
    index, odd = next((index, each) for index, each in enumerate(flat) if type(each) not in kinds)
    what = _KINDS.get(type(odd), type(odd).__name__)
    raise BadRequestError(f"{where}: element {index} is {what} ({_brief(odd)}); {spec.datatype} takes {words}")


def _integers(flat: list[int], spec: TensorSpec, where: str) -> np.ndarray:
    kind = NUMPY[spec.datatype]
    if flat:
        limits = np.iinfo(kind)
        if min(flat) < limits.min or max(flat) > limits.max:
            index = next(index for index, each in enumerate(flat) if not limits.min <= each <= limits.max)
            raise _range(index, flat[index], spec, where)
    return np.array(flat, kind)


def _floats(flat: list[float], spec: TensorSpec, where: str) -> np.ndarray:
    try:
        wide = np.array(flat, np.float64)
    except OverflowError:  # an integer beyond all floats
        index = next(index for index, each in enumerate(flat) if abs(each) > sys.float_info.max)
        raise _range(index, flat[index], spec, where) from None
    if spec.datatype == "FP64":
        return wide
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = wide.astype(NUMPY.get(spec.datatype, "<f4"))
        if spec.datatype == "BF16":
            narrow, halves = _to_bf16(narrow)
    if not np.isfinite(narrow).all():
        lost = np.isinf(narrow) & np.isfinite(wide)
        if lost.any():
            index = int(lost.argmax())
            raise _range(index, flat[index], spec, where)
    return halves if spec.datatype == "BF16" else narrow


def _to_bf16(narrow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # To the nearest, ties to even; NaN stays NaN whatever its bits are.
    bits = narrow.view("<u4").astype(np.uint64)
    halves = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype("<u2")
    halves = np.where(np.isnan(narrow), np.uint16(0x7FC0), halves).astype("<u2")
    return (halves.astype("<u4") << 16).view("<f4"), halves


def _range(index: int, odd: Any, spec: TensorSpec, where: str) -> BadRequestError:
    return BadRequestError(f"{where}: element {index} is {_brief(odd)}, which {spec.datatype} cannot hold")


def _brief(told: Any) -> str:
    try:
        said = repr(told if not isinstance(told, list | str) else told[:40])
    except ValueError:  # an integer of more digits than Python writes
        return "an integer of too many digits"
    return said if len(said) <= 80 else f"{said[:77]}..."
