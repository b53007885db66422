"""Where named tensors lie within one record: 64-byte aligned one after the other, the whole rounded up to a page."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from narrowboat.errors import SpillError, TrainingError
from narrowboat.quantities import format_bytes

PAGE = 4096
ALIGNMENT = 64  # bytes; what torch's own allocator gives on CPU, and what its kernels choose their path by
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _rounded(nbytes: int, unit: int) -> int:
    return -(-nbytes // unit) * unit


def record_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of a record that holds ``tensors`` (tensors on the meta device will do), in whole pages."""
    return _rounded(sum(_rounded(t.numel() * t.element_size(), ALIGNMENT) for t in tensors), PAGE)


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor of a record.

    Attributes:
        name: its name within the record.
        dtype, shape: its own.
        stride: in elements; its own where it is dense, so that channels-last stays channels-last.
        offset: bytes from the start of the record.
        device: where the tensor was and where it is wanted again.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    device: str = "cpu"

    def view(self, memory: mmap.mmap) -> torch.Tensor:
        """The tensor over the record in ``memory``, by reference."""
        count = 1
        for size in self.shape:
            count *= size
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        flat = torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset)
        # .data: a tensor of its own, not recorded as a view of the flat one.
        return flat.as_strided(self.shape, self.stride).data


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a record and its size in whole pages."""

    places: tuple[Place, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Layout:
        """The layout for those tensors, in that order.

        Raises:
            TrainingError: one is sparse or of a tensor subclass: its bytes are not its values.
        """
        places = []
        offset = 0
        for name, tensor in tensors.items():
            if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
                raise TrainingError(
                    f"{name} is a {type(tensor).__name__} of layout {tensor.layout}, which cannot be kept on storage; "
                    "keep optimizer state and gradients in memory for this model"
                )
            # What clone() would give: the tensor's own strides unless it overlaps itself or has gaps.
            stride = torch.empty_like(tensor, device="meta").stride()
            places.append(Place(name, tensor.dtype, tuple(tensor.shape), tuple(stride), offset, str(tensor.device)))
            offset += _rounded(tensor.numel() * tensor.element_size(), ALIGNMENT)
        return cls(tuple(places), _rounded(offset, PAGE))

    def to_json(self) -> list[list[Any]]:
        """Rows for the header."""
        return [
            [p.name, str(p.dtype).removeprefix("torch."), list(p.shape), list(p.stride), p.offset, p.device]
            for p in self.places
        ]

    @classmethod
    def from_json(cls, rows: list[list[Any]], nbytes: int) -> Layout:
        """The layout that :meth:`to_json` told."""
        places = [
            Place(name, getattr(torch, dtype), tuple(shape), tuple(stride), offset, device)
            for name, dtype, shape, stride, offset, device in rows
        ]
        return cls(tuple(places), nbytes)


class Record:
    """A record in memory: page-aligned bytes and the tensors that lie in them.

    Attributes:
        layout: which tensors, and where.
        tensors: by name, over the record's bytes by reference; those of another device are copies there.
        memory: the bytes; at least ``layout.nbytes``.
    """

    def __init__(self, layout: Layout, memory: mmap.mmap) -> None:
        self.layout = layout
        self.memory = memory
        self._views = {place.name: place.view(memory) for place in layout.places}
        self.tensors: dict[str, torch.Tensor] = {}

    def bring(self) -> None:
        """Make ``tensors``, once the bytes are in."""
        self.tensors = {
            place.name: view if place.device == "cpu" else view.to(place.device)
            for place, view in zip(self.layout.places, self._views.values(), strict=True)
        }

    def holds(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether each of ``tensors`` already lies where this record has it: nothing is left to copy."""
        return list(tensors) == list(self._views) and all(
            tensor.device.type == "cpu"
            and tensor.data_ptr() == view.data_ptr()
            and tensor.dtype == view.dtype
            and tensor.shape == view.shape
            and tensor.stride() == view.stride()
            for tensor, view in zip(tensors.values(), self._views.values(), strict=True)
        )

    def shares(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether any of ``tensors`` lies in this record's memory."""
        start = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
        storages = [tensor.untyped_storage() for tensor in tensors.values() if tensor.device.type == "cpu"]
        return any(start <= storage.data_ptr() < start + len(self.memory) for storage in storages)

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy ``tensors`` in."""
        with torch.no_grad():
            for name, view in self._views.items():
                view.copy_(tensors[name])


class Buffers:
    """Page-aligned memory for records, reused between records of about the same size.

    Not safe for several threads; the caller holds a lock.

    Attributes:
        held: bytes handed out and not given back.
        peak: the most that was ever held; what waits to be reused never adds to it.
    """

    def __init__(self) -> None:
        self._free: mmap.mmap | None = None
        self.held = 0
        self.peak = 0

    def take(self, nbytes: int) -> mmap.mmap:
        """Memory of at least ``nbytes``.

        Raises:
            SpillError: the system has no such memory.
        """
        wanted = max(_rounded(nbytes, PAGE), PAGE)
        free, self._free = self._free, None
        if free is None or not wanted <= len(free) <= 2 * wanted:
            free = None  # given back to the system before more is taken
            try:
                free = mmap.mmap(-1, wanted, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise SpillError(
                    f"no memory for a record of {format_bytes(wanted)}: {error.strerror}; use smaller buckets"
                ) from error
        self.held += len(free)
        self.peak = max(self.peak, self.held)
        return free

    def give(self, memory: mmap.mmap) -> None:
        """Take memory back."""
        self.held -= len(memory)
        self._free = memory

    def forget(self) -> None:
        """Give what waits to be reused back to the system."""
        self._free = None
