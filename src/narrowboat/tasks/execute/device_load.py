"""The load engine on a device: chunks are mapped and copied to their fixed addresses, beside the kernels that run.

Why nothing is used too early or overwritten too soon:

*Before a copy.* A chunk that is mapped afresh is nobody's. It was unmapped only after the worker that used it had
waited, at its block boundary, for its kernels; the loader knows that from the token that came with the block.

*Before a use.* The loader's thread waits for the copies' mark before it reports the block; the worker takes over what
the loader knew then before it shows the weights to the network. No kernel is ever given before.

*Beside each other.* While one chunk is copied the next is mapped. At most ``AHEAD`` copies are under way, so that an
order which is given up ends soon.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from narrowboat.arena.device.interface import Event
from narrowboat.errors import DeviceError, StorageError
from narrowboat.stream.reader import Extent, Reader
from narrowboat.stream.reader import Job as ReadJob
from narrowboat.tasks.execute.device_place import Span

if TYPE_CHECKING:
    from narrowboat.tasks.execute.device_model import DeviceTaskModel

AHEAD = 4  # chunks


class Passage:
    """Some units of a network on their way in. Used by one thread, and given up by any.

    Args:
        model: whose.
        spans: what is wanted; nothing uses these bytes, and what may be left of them counts for nothing.
    """

    def __init__(self, model: DeviceTaskModel, spans: Sequence[Span]) -> None:
        self._model, self._spans = model, spans
        self._device, self._copies = model.ground.device, model.ground.copies
        self._under_way: deque[Event] = deque()
        self._given_up = threading.Event()
        self._read: ReadJob | None = None

    def cancel(self) -> None:
        """End within ``AHEAD`` chunks."""
        self._given_up.set()
        if self._read is not None:
            self._model.reader.cancel(self._read)

    def run(self) -> object:
        """Return when the bytes are there, with what the calling thread knows then.

        Raises:
            DeviceMemoryError: the device has no memory free, although it is within the budget: somebody else took it.
            StorageError: a read failed, or it was given up.
            NarrowboatError: another error of device or storage. In any case nothing of it is in then.
        """
        self._unmap()  # what is left of earlier loads: mapping is a part of what a load costs
        try:
            for unit, low, high in self._spans:
                if unit in self._model.mirror.offsets:
                    self._from_mirror(unit, low, high)
                else:
                    self._from_storage(unit, low, high)
            while self._under_way:
                self._under_way.popleft().wait()
        except BaseException:
            with contextlib.suppress(DeviceError):
                self._copies.record().wait()
            self._unmap()
            raise
        return self._device.hand_over()

    def _unmap(self) -> None:
        for _, low, high in self._spans:
            self._model.window.unback(low, high - low)

    def _check(self) -> None:
        if self._given_up.is_set():
            raise StorageError("loading was given up")

    def _from_mirror(self, unit: int, low: int, high: int) -> None:
        model, device = self._model, self._device
        window, mirror = model.window, model.mirror
        assert mirror.slab is not None
        device.take_over(mirror.known)
        home, used = model.homes[unit], model.used[unit]
        source = mirror.slab.address + mirror.offsets[unit] - home
        for at in range(low, high, window.chunk):
            self._check()
            window.back(at)
            nbytes = min(window.chunk, home + used - at)
            if nbytes > 0:
                device.copy_in(window.address + at, source + at, nbytes, self._copies)
                model.ground.count(nbytes)
                self._under_way.append(self._copies.record())
            if len(self._under_way) >= AHEAD:
                self._under_way.popleft().wait()

    def _from_storage(self, unit: int, low: int, high: int) -> None:
        model, window = self._model, self._model.window
        for at in range(low, high, window.chunk):
            self._check()
            window.back(at)
        landing = _Landing(model)
        extents = [part for extent in model.parts[unit].extents if (part := _within(extent, low, high)) is not None]
        read = self._read = model.reader.submit(model.parts[unit].name, window, extents, landing=landing)
        if self._given_up.is_set():
            model.reader.cancel(read)
        try:
            model.reader.wait(read)
        finally:
            landing.learn()
        self._under_way.append(read.ready)


def _within(extent: Extent, low: int, high: int) -> Extent | None:
    """The part of an extent whose target lies in ``[low, high)``."""
    first, last = max(extent.target, low), min(extent.target + extent.nbytes, high)
    if first >= last:
        return None
    return Extent(extent.file, extent.offset + first - extent.target, last - first, first)


class _Landing:
    """Pieces from storage through staging buffers to the device: see ``stream.reader.Landing``."""

    def __init__(self, model: DeviceTaskModel) -> None:
        self._ground, self._window = model.ground, model.window
        self._device = model.ground.device
        self._begin = self._device.hand_over()
        self._known: list[object] = []

    def land(self, reader: Reader, piece: Extent, worker: int) -> int:
        """See ``Landing``."""
        ground, device = self._ground, self._device
        staging = ground.staging
        assert staging is not None
        device.take_over(self._begin)
        try:
            number, offset = staging.take(worker)
            head = reader.fetch(piece, staging.bytes_of(offset))
            target, source = self._window.address + piece.target, staging.slab.address + offset + head
            device.copy_in(target, source, piece.nbytes, ground.copies)
            staging.give(number, ground.copies.record())
            ground.count(piece.nbytes)
        finally:
            self._known.append(device.hand_over())
        return 0

    def landed(self) -> Any:
        """See ``Landing``."""
        return self._ground.copies.record()

    def learn(self) -> None:
        """The calling thread has waited for the readers'."""
        for known in self._known:
            self._device.take_over(known)
