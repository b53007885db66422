"""The device's slab: reserved addresses, backed chunk by chunk, handed out as tensors by reference."""

from __future__ import annotations

import contextlib
import threading

import torch

from narrowboat.arena.device.interface import Device, Event
from narrowboat.arena.device.unbroken import unbroken
from narrowboat.arena.exports import forget, watch
from narrowboat.arena.slab import Slab
from narrowboat.errors import DeviceLostError
from narrowboat.quantities import format_bytes

Ranges = list[tuple[int, int]]


class DeviceSlab:
    """What ``arena.slab.Slab`` is in host memory, in a device's.

    Args:
        device: whose memory.
        nbytes: of addresses; rounded up to whole chunks.
        chunk: bytes of memory that come and go together, rounded up to the device's granularity; None for that.
        populate: hold everything from the start; otherwise nothing.

    Attributes:
        address: of the first byte; it stays.
        mapped_bytes: of physical memory, whole chunks.
        locked: always; the device's memory is not swapped out.

    Raises:
        DeviceMemoryError: the device has no such memory free.
    """

    locked = True

    def __init__(self, device: Device, nbytes: int, *, chunk: int | None = None, populate: bool = True) -> None:
        grain = device.granularity
        self.device = device
        self.chunk = max(-(-(chunk or grain) // grain), 1) * grain
        self.nbytes = max(-(-nbytes // self.chunk), 1) * self.chunk
        self.address = device.reserve(self.nbytes)
        self._chunks: dict[int, object] = {}  # handle by number
        self._held: Ranges = []  # disjoint, ascending
        self._lock = threading.Lock()
        self._ticket = watch(self.address, self.nbytes)
        if populate:
            try:
                self.hold([(0, self.nbytes)])
            except BaseException:
                self.close()
                raise

    @property
    def mapped_bytes(self) -> int:
        """Bytes of physical memory behind the addresses now."""
        return len(self._chunks) * self.chunk

    @property
    def held(self) -> Ranges:
        """The byte ranges ``(offset, nbytes)`` that are held, disjoint and ascending; a copy."""
        return list(self._held)

    def would_map(self, ranges: Ranges) -> int:
        """Bytes of memory that holding exactly these ranges takes: they are rounded out to chunks."""
        return len(self._chunks_of(ranges)) * self.chunk

    def hold(self, ranges: Ranges, *, behind: bool = False) -> None:
        """Back byte ranges ``(offset, nbytes)`` with memory; what is backed stays as it is.

        Raises:
            DeviceMemoryError: the device has no such memory free; nothing has changed.
        """

        def grow() -> None:
            with self._lock:
                self._become(_union([*self._held, *ranges]))

        unbroken(self.device, grow)

    def release(self, ranges: Ranges, *, after: Event | None = None) -> None:
        """Give back the memory of chunks that only lie in these ranges; waits until the device is done with it.

        Args:
            after: a mark behind everything that uses these bytes; None: all that was given to the device.
        """

        def shrink() -> None:
            with self._lock:
                self._become(_without(self._held, _union(ranges)), after)

        unbroken(self.device, shrink)

    def back(self, offset: int) -> bool:
        """Back the one chunk at ``offset``; True if it was not. For an owner who counts chunks itself, and neither
        holds nor releases ranges: it takes as long as mapping does, however many chunks there are.

        Raises:
            DeviceMemoryError: the device has no such memory free.
        """
        number = offset // self.chunk
        with self._lock:
            if number in self._chunks:
                return False
            self._chunks[number] = self.device.map(self.address + number * self.chunk, self.chunk)
            return True

    def unback(self, offset: int, nbytes: int) -> int:
        """Give back the chunks in a range, of those that ``back`` has backed; returns how many bytes those were.

        Nothing is waited for: the caller vouches that the device is done with them, where ``release`` would wait for
        everybody's kernels.
        """
        numbers = range(offset // self.chunk, -(-(offset + nbytes) // self.chunk))
        with self._lock:
            going = [number for number in numbers if number in self._chunks]
            for number in going:
                self._drop(number)
        return len(going) * self.chunk

    def _become(self, held: Ranges, after: Event | None = None) -> None:
        wanted = self._chunks_of(held)
        going = [number for number in self._chunks if number not in wanted]
        coming = sorted(wanted - self._chunks.keys())
        if going and after is not None:
            after.wait()
        elif going:
            self.device.synchronize()
        made: list[int] = []
        try:
            for number in coming:
                self._chunks[number] = self.device.map(self.address + number * self.chunk, self.chunk)
                made.append(number)
        except BaseException:
            for number in made:
                self._drop(number)
            raise
        for number in going:
            self._drop(number)
        self._held = held

    def _drop(self, number: int) -> None:
        self.device.unmap(self.address + number * self.chunk, self.chunk, self._chunks[number])
        del self._chunks[number]

    def _chunks_of(self, ranges: Ranges) -> set[int]:
        return {
            number
            for offset, nbytes in ranges
            if nbytes > 0
            for number in range(offset // self.chunk, (offset + nbytes - 1) // self.chunk + 1)
        }

    def copy(self, offset: int, target: int, nbytes: int) -> None:
        """Copy within the slab, after the kernels given so far and before those to come."""
        self.device.copy_within(self.address + target, self.address + offset, nbytes, self.device.compute())

    def bytes_at(self, offset: int, nbytes: int) -> memoryview:
        """A copy of the bytes ``[offset, offset + nbytes)`` as they are when the kernels given so far have run."""
        aside = Slab(nbytes)
        self.device.pin(aside)
        try:
            stream = self.device.compute()
            self.device.copy_out(aside.address, self.address + offset, nbytes, stream)
            stream.synchronize()
            return memoryview(bytes(aside.bytes_at(0, nbytes)))
        finally:
            self.device.unpin(aside)
            aside.close()

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A contiguous tensor over the bytes at ``offset``, by reference, with a storage object of its own."""
        return self.device.tensor(self.address + offset, dtype, shape, self)

    def finish_populating(self, *, give_up: bool = False) -> None:
        """Nothing is populated behind the caller's back here."""

    def close(self) -> None:
        """Give memory and addresses back; what the device still does with them is waited for. Idempotent."""
        if self.__dict__.get("address"):
            unbroken(self.device, self._close)

    def _close(self) -> None:
        with self._lock:
            if not self.address:
                return
            try:
                self._become([])
            except DeviceLostError:  # its memory is lost with it
                self._chunks, self._held = {}, []
            forget(self._ticket)
            address, self.address = self.address, 0
            self.device.unreserve(address, self.nbytes)

    def __del__(self) -> None:
        if self.__dict__.get("address"):
            self.device.reclaim(self.close)

    def __repr__(self) -> str:
        return f"<{format_bytes(self.mapped_bytes)} of {format_bytes(self.nbytes)} on {self.device.name}>"


def _union(ranges: Ranges) -> Ranges:
    merged: Ranges = []
    for offset, nbytes in sorted(r for r in ranges if r[1] > 0):
        if merged and merged[-1][0] + merged[-1][1] >= offset:
            merged[-1] = merged[-1][0], max(merged[-1][1], offset + nbytes - merged[-1][0])
        else:
            merged.append((offset, nbytes))
    return merged


def _without(ranges: Ranges, others: Ranges) -> Ranges:
    left: Ranges = []
    for offset, nbytes in ranges:
        at, end = offset, offset + nbytes
        for low, size in others:
            if low + size <= at or low >= end:
                continue
            if low > at:
                left.append((at, low - at))
            at = max(at, low + size)
        if at < end:
            left.append((at, end - at))
    return left


class InPlaceSlab(Slab):
    """A host slab on which a device computes: for devices that share the host's memory. Pinned, and held at once.

    Args:
        device: which.
        nbytes: size.

    Raises:
        PinnedMemoryError: the system refuses to pin it.
        StorageError: it has no such memory.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        super().__init__(nbytes)
        self.device = device
        try:
            device.pin(self)
        except BaseException:
            super().close()
            raise
        self._seen_at = device.in_place(self)

    @property
    def mapped_bytes(self) -> int:
        """As of ``DeviceSlab``."""
        return self.nbytes if "_map" in self.__dict__ else 0

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """See ``Slab``; a tensor of the device."""
        return self.device.tensor(self._seen_at + offset, dtype, shape, self)

    def close(self) -> None:
        """See ``Slab``; what the device still does with it is waited for."""
        if "_map" in self.__dict__:
            with contextlib.suppress(DeviceLostError):
                self.device.synchronize()
            self.device.unpin(self)
            super().close()

    def __del__(self) -> None:
        if "_seen_at" in self.__dict__ and "_map" in self.__dict__:
            self.device.reclaim(self.close)
        else:
            super().__del__()
