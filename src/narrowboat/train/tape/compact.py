"""Saved tensors in fewer bytes, exactly: masks as bits, indices as the smallest integers that hold them.

What is looked at is bit patterns, never values: -0.0 is not 0.0 here, and a NaN is equal to itself. The bytes are read
and written through numpy views of the same memory, so that no operator of torch is called but the one that allocates.

Sources: SAGE keeps dropout masks as bits; ``numpy.packbits``.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Kind = Literal["bits", "ints"]
Words = np.ndarray[Any, np.dtype[Any]]

_FIRST, _PIECE = (
    1 << 12,
    1 << 16,
)  # elements looked at in one go: few until two values are known, then what caches hold
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_INTEGERS = {torch.int64: np.int64, torch.int32: np.int32, torch.int16: np.int16}
_SMALLER = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32)


@dataclass(frozen=True, slots=True)
class Compacted:
    """A tensor in fewer bytes.

    Attributes:
        kind: ``"bits"``: one bit per element says which of two bit patterns it is; ``"ints"``: smaller integers.
        dtype, shape, stride: of the tensor.
        payload: the bits, eight to a byte in the order of memory (first element highest), or the integers.
        patterns: for ``"bits"`` the bit pattern of an element whose bit is 0, and of one whose bit is 1.
    """

    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    payload: Words
    patterns: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.payload.nbytes

    def restore(self) -> torch.Tensor:
        """The tensor, bit for bit, with its shape and strides, in a storage of its own."""
        with torch.inference_mode(False), torch.no_grad():
            tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        if self.kind == "ints":
            _memory(tensor, _INTEGERS[self.dtype])[:] = self.payload
        else:
            _spread(self.payload, self.patterns, _memory(tensor, _WORDS[tensor.element_size()]))
        return tensor


def compact(tensor: torch.Tensor, kind_hint: Kind | None = None) -> Compacted | None:
    """``tensor`` in fewer bytes; None where there is no exact way to save any.

    Two things are recognised: at most two different bit patterns in all of it (masks, dropout noise whether divided
    or not), and integers whose least and largest fit a smaller type (indices of max-pooling). A tensor that is neither
    is given up after a few thousand elements, one of integers after a pass.

    Args:
        tensor: of any shape, in memory of the CPU without gaps or overlaps (contiguous, channels-last, transposed).
        kind_hint: look for this only. It is checked all the same.
    """
    if not _plain(tensor):
        return None
    if kind_hint != "ints" and (found := _bits(tensor)) is not None:
        return found
    return None if kind_hint == "bits" else _ints(tensor)


def _plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory can be looked at, and is without gaps and overlaps."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        return False
    if tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return tensor.numel() > 0 and tensor.data_ptr() != 0


def _memory(tensor: torch.Tensor, dtype: Any) -> Words:
    """The tensor's elements in the order of memory, by reference; the tensor must outlive them."""
    nbytes = tensor.numel() * tensor.element_size()
    return np.frombuffer(memoryview((ctypes.c_ubyte * nbytes).from_address(tensor.data_ptr())), dtype=dtype)


def _bits(tensor: torch.Tensor) -> Compacted | None:
    word = _WORDS.get(tensor.element_size())
    total = tensor.numel()
    if word is None or -(-total // 8) >= total * tensor.element_size():
        return None
    words = _memory(tensor, word)
    packed = np.empty(-(-total // 8), np.uint8)
    low, high = words[0], None
    start, length = 0, _FIRST
    while start < total:
        piece = words[start : start + length]
        differs = piece != low
        if count := np.count_nonzero(differs):
            if high is None:
                high = piece[differs.argmax()]
            # As ``high`` is not ``low``, equally many means the same ones.
            if np.count_nonzero(piece == high) != count:
                return None
        packed[start // 8 : -(-(start + len(piece)) // 8)] = np.packbits(differs)
        start, length = start + length, _PIECE
    patterns = (int(low), int(low if high is None else high))
    return Compacted("bits", tensor.dtype, tuple(tensor.shape), tensor.stride(), packed, patterns)


def _spread(packed: Words, patterns: tuple[int, int], target: Words) -> None:
    """Write a pattern per bit of ``packed`` to ``target``, eight at a time from a table of all bytes."""
    low, high = (target.dtype.type(pattern) for pattern in patterns)
    table = np.where(np.unpackbits(np.arange(256, dtype=np.uint8)).reshape(256, 8), high, low)
    whole = len(target) // 8
    # "clip" writes to the target itself; the default goes through a buffer.
    np.take(table, packed[:whole], axis=0, out=target[: 8 * whole].reshape(-1, 8), mode="clip")
    if rest := len(target) % 8:
        target[8 * whole :] = table[packed[whole], :rest]


def _ints(tensor: torch.Tensor) -> Compacted | None:
    wide = _INTEGERS.get(tensor.dtype)
    if wide is None:
        return None
    values = _memory(tensor, wide)
    least, largest = int(values.min()), int(values.max())
    for narrow in _SMALLER:
        info = np.iinfo(narrow)
        if info.dtype.itemsize < tensor.element_size() and info.min <= least and largest <= info.max:
            payload = values.astype(narrow)
            return Compacted("ints", tensor.dtype, tuple(tensor.shape), tensor.stride(), payload)
    return None
