"""Tensors as bytes, and what a task takes and gives: what crosses between processes. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Names of the Open Inference Protocol, and bytes of one element. BF16 has no numpy type: its bytes are passed on.
SIZES: dict[str, int] = {
    "BOOL": 1,
    "UINT8": 1,
    "UINT16": 2,
    "UINT32": 4,
    "UINT64": 8,
    "INT8": 1,
    "INT16": 2,
    "INT32": 4,
    "INT64": 8,
    "FP16": 2,
    "BF16": 2,
    "FP32": 4,
    "FP64": 8,
}
Buffer = bytes | bytearray | memoryview
# What PyTorch has beside, under its own names: programs may hand it over, the protocol has no word for it.
_OTHERS = {"complex64": 8, "complex128": 16, "complex32": 4}
_ALIGNED = 64  # kernels choose their path by alignment: invariant 1


def element_bytes(datatype: str) -> int:
    """Of one element of ``datatype``."""
    return SIZES.get(datatype) or _OTHERS.get(datatype, 1)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a task takes or gives.

    Attributes:
        name: of the forward's parameter, or of the output's key or place.
        datatype: a key of ``SIZES``.
        shape: exact; a task is analysed for one shape.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its elements."""
        return math.prod(self.shape) * element_bytes(self.datatype)

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> TensorSpec:
        """What :meth:`as_json` made."""
        return cls(told["name"], told["datatype"], tuple(told["shape"]))


@dataclass(frozen=True)
class RawTensor:
    """A tensor by its bytes.

    Attributes:
        datatype: a key of ``SIZES``.
        shape: of it.
        data: its elements, little-endian, in row-major order.
    """

    datatype: str
    shape: tuple[int, ...]
    data: Buffer


@dataclass(frozen=True)
class Signature:
    """What a task takes and gives.

    Attributes:
        inputs: all of them have to be given.
        outputs: in this order.
        takes, gives: how these lie in the positional arguments and in the output: ``{"tensor": k}`` for the k-th,
            ``{"plain": value}``, ``{"list" | "tuple": [...]}``, ``{"dict": [[key, ...], ...]}``.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    takes: Any = None
    gives: Any = None

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return {
            "inputs": [spec.as_json() for spec in self.inputs],
            "outputs": [spec.as_json() for spec in self.outputs],
            "takes": self.takes,
            "gives": self.gives,
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Signature:
        """What :meth:`as_json` made."""
        inputs, outputs = (tuple(map(TensorSpec.from_json, told[key])) for key in ("inputs", "outputs"))
        return cls(inputs, outputs, told["takes"], told["gives"])

    @property
    def slot_bytes(self) -> int:
        """Of shared memory that one job's tensors take on their way in and out."""
        return self.output_offset + packed(self.outputs)[1]

    @property
    def input_offsets(self) -> list[int]:
        """Of the inputs in a slot."""
        return packed(self.inputs)[0]

    @property
    def output_offset(self) -> int:
        """Of the first output in a slot."""
        return packed(self.inputs)[1]


def packed(specs: Sequence[TensorSpec]) -> tuple[list[int], int]:
    """Aligned offsets of tensors one after the other, and the bytes of all."""
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        end += -(-spec.nbytes // _ALIGNED) * _ALIGNED
    return offsets, end
