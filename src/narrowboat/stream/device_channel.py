"""From storage through pinned host memory to a device, beside the kernels that run there.

Why nothing is used too early or overwritten too soon:

*Before a copy in.* A block's place is free when the host has given the device the last kernel that uses it. When the
block is submitted, a mark is put into the compute stream, and the copy stream waits for the mark before the block's
first copy. The host waits for nothing.

*Before a use.* When the last piece of a block has been given to the copy stream, a mark is put there; before the first
kernel that uses the block, the compute stream waits for that mark. The host waits only until the mark exists: at once
for a block in the host cache; for one on storage, until its bytes are read.

*Straight from storage.* Where the system can read from storage into the device (``arena.device.gds``), blocks that are
not in the host cache come that way: the reader's thread waits for the mark, reads, and the host has waited for the
read before it gives the kernels that use it.

*Staging and cache.* A reader's thread writes over a staging buffer when the copy from it is done (``staging``), and
into the host cache only before the first copy from there.

*Streams.* Kernels of a pass go to the stream that is current in its thread. A pass on another stream than the one
before is put after it. What a module runs on streams of its own has to be joined before the module returns.

``Tensor.record_stream`` is not used: it keeps memory from being given back until some later moment that nobody can
name, where the arena needs that moment to be the mark.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from narrowboat.arena.device.interface import Device, Event, Stream
from narrowboat.stream.blocks import BlockState
from narrowboat.stream.host_cache import CacheSlot, HostCache
from narrowboat.stream.reader import PAGE, Extent, Job, Landing, Reader
from narrowboat.stream.staging import Staging


class _Ordered:
    """What the two channels share: whose stream it is, and who reads."""

    def __init__(self, reader: Reader, device: Device) -> None:
        self._reader, self._device = reader, device
        self._compute: Stream | None = None
        self.heard: dict[int, object] = {}  # by reader's thread: what it last knew

    def begin(self) -> None:
        """See ``Channel``."""
        self._follow()

    def _follow(self) -> Stream:
        """The stream of this thread's kernels; after the one before, if that was another."""
        now = self._device.compute()
        if self._compute is not None and self._compute != now:
            now.wait(self._compute.record())
        self._compute = now
        return now

    def wait(self, job: Job) -> None:
        """See ``Channel``."""
        self._reader.wait(job)

    def drained(self) -> None:
        """See ``Channel``."""
        for known in list(self.heard.values()):
            self._device.take_over(known)


class DeviceChannel(_Ordered):
    """See ``channel.Channel``.

    Args:
        reader: reads from storage.
        device: where blocks go.
        staging: buffers on the way.
        cache: blocks that host memory keeps.
        direct: for each weights file, what reads from it straight into the device; empty where nothing can.

    Attributes:
        bytes_copied: from host memory to the device.
    """

    def __init__(
        self,
        reader: Reader,
        device: Device,
        staging: Staging,
        cache: HostCache,
        direct: Sequence[Straight] = (),
    ) -> None:
        super().__init__(reader, device)
        self._direct = direct
        self.staging, self.cache = staging, cache
        self.copies = device.stream("copies")
        self.bytes_copied = 0
        self._counting = threading.Lock()

    def submit(self, block: BlockState, slab: Any, extents: Sequence[Extent], *, urgent: bool) -> Job:
        """See ``Channel``."""
        free = self._follow().record()
        slot = self.cache.slot(block.index)
        base = 0 if slab is block.private else block.offset or 0
        if slot is not None:
            holds = (*(weight.index for weight in block.weights), *block.places)
            if slot.filled and slot.holds == holds:
                return self._from_cache(block, slab, base, slot, free)
            if slot.begun:  # of a read that failed, or of another block: copies from there may be under way
                self.copies.synchronize()
            slot.begun, slot.filled, slot.holds = True, False, holds
        landing: Landing
        if slot is None and self._direct and all((e.offset | e.target | e.nbytes) % PAGE == 0 for e in extents):
            landing = _Directly(self, slab, free, self._direct)
        else:
            landing = _Passage(self, slab, free, slot, base)
        return self._reader.submit(block.name, slab, extents, urgent=urgent, landing=landing)

    def _from_cache(self, block: BlockState, slab: Any, base: int, slot: CacheSlot, free: Event) -> Job:
        assert self.cache.slab is not None
        self._device.take_over(slot.known)
        self.copies.wait(free)
        source = self.cache.slab.address + slot.offset
        self._device.copy_in(slab.address + base, source, block.nbytes, self.copies)
        self.count(block.nbytes)
        ready = (self.copies.record(), slot.known)
        return Job(block.name, slab, (), done=True, ready=ready, nbytes=block.nbytes)

    def make_ready(self, block: BlockState) -> None:
        """See ``Channel``."""
        if block.ready is not None:
            (event, known), block.ready = block.ready, None
            self._device.take_over(known)
            if event is not None:
                self._follow().wait(event)

    def give_up(self, block: BlockState) -> None:
        """See ``Channel``. What comes to its place is in the same stream of copies."""
        (_, known), block.ready = block.ready, None
        self._device.take_over(known)

    def count(self, nbytes: int) -> None:
        """So many bytes more were copied to the device."""
        with self._counting:
            self.bytes_copied += nbytes

    def close(self) -> None:
        """Give the pinned memory back, when the device is done with it; the reader is closed."""
        self.drained()
        self._device.synchronize()
        self.staging.close()
        self.cache.close()


class Straight(Protocol):
    """Reads from one file into a device."""

    def read(self, offset: int, address: int, nbytes: int) -> None:
        """Whole pages, from a page of the file to a page-aligned address; returns when they are there."""


class InPlaceChannel(_Ordered):
    """For a device that computes on host memory: storage is read straight into the arena, and nothing is copied.

    Args:
        reader: reads from storage.
        device: which.
    """

    bytes_copied = 0

    def submit(self, block: BlockState, slab: Any, extents: Sequence[Extent], *, urgent: bool) -> Job:
        """See ``Channel``."""
        landing = _Overwrite(self, slab, self._follow().record())
        return self._reader.submit(block.name, slab, extents, urgent=urgent, landing=landing)

    def make_ready(self, block: BlockState) -> None:
        """See ``Channel``. Kernels see what the host wrote before they were given."""
        if block.ready is not None:
            self._device.take_over(block.ready)
            block.ready = None
            self._follow()

    def give_up(self, block: BlockState) -> None:
        """See ``Channel``."""
        self.make_ready(block)

    def close(self) -> None:
        """Wait until the device is done; the reader is closed."""
        self.drained()
        self._device.synchronize()


class _Job(Landing, ABC):
    """One job on its way, in the reader's threads.

    Args:
        channel: whose.
        slab: of the device.
        free: the block's place is free after it.
    """

    def __init__(self, channel: _Ordered, slab: Any, free: Event) -> None:
        self._owner, self._device, self._slab, self._free = channel, channel._device, slab, free
        self._known = [self._device.hand_over()]

    def land(self, reader: Reader, piece: Extent, worker: int) -> int:
        """See ``reader.Landing``."""
        self._device.take_over(self._known[0])
        try:
            return self._bring(reader, piece, worker)
        finally:
            known = self._device.hand_over()
            self._known.append(known)
            self._owner.heard[worker] = known

    @abstractmethod
    def _bring(self, reader: Reader, piece: Extent, worker: int) -> int:
        """Bring one piece; see ``land``."""

    def _all_known(self) -> object:
        for known in self._known:
            self._device.take_over(known)
        return self._device.hand_over()


class _Passage(_Job):
    """Read into host memory, and copied on.

    Args:
        via: the block's place in the host cache, to be filled on the way; None: through staging.
        base: offset of the block in ``slab``.
    """

    def __init__(self, channel: DeviceChannel, slab: Any, free: Event, via: CacheSlot | None, base: int) -> None:
        super().__init__(channel, slab, free)
        self._channel, self._via, self._base = channel, via, base
        self._lock = threading.Lock()
        self._waits = False

    def _bring(self, reader: Reader, piece: Extent, worker: int) -> int:
        channel, target = self._channel, self._slab.address + piece.target
        if self._via is not None:
            assert channel.cache.slab is not None
            place = self._via.offset + piece.target - self._base
            moved = Extent(piece.file, piece.offset, piece.nbytes, place)
            self._device.host_writes(channel.cache.slab.address + place, piece.nbytes)
            copied = reader.place(moved, channel.cache.slab, worker)
            self._copy(target, channel.cache.slab.address + place, piece.nbytes)
            return copied
        number, offset = channel.staging.take(worker)
        head = reader.fetch(piece, channel.staging.bytes_of(offset))
        self._copy(target, channel.staging.slab.address + offset + head, piece.nbytes)
        channel.staging.give(number, channel.copies.record())
        return 0

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        channel = self._channel
        with self._lock:  # the wait has to be in the stream before any of the copies
            if not self._waits:
                channel.copies.wait(self._free)
                self._waits = True
            self._device.copy_in(target, source, nbytes, channel.copies)
        channel.count(nbytes)

    def landed(self) -> Any:
        """See ``reader.Landing``."""
        known = self._all_known()
        if self._via is not None:
            self._via.known, self._via.filled = known, True
        return self._channel.copies.record(), known


class _Overwrite(_Job):
    """Read straight into the arena, by threads that wait until the place is free."""

    def _bring(self, reader: Reader, piece: Extent, worker: int) -> int:
        self._free.wait()
        self._device.host_writes(self._slab.address + piece.target, piece.nbytes)
        return reader.place(piece, self._slab, worker)

    def landed(self) -> Any:
        """See ``reader.Landing``."""
        return self._all_known()


class _Directly(_Job):
    """Read from storage into the device, past host memory."""

    def __init__(self, channel: _Ordered, slab: Any, free: Event, direct: Sequence[Straight]) -> None:
        super().__init__(channel, slab, free)
        self._direct = direct

    def _bring(self, reader: Reader, piece: Extent, worker: int) -> int:
        self._free.wait()
        target = self._slab.address + piece.target
        self._device.host_writes(target, piece.nbytes)
        self._direct[piece.file].read(piece.offset, target, piece.nbytes)
        return 0

    def landed(self) -> Any:
        """See ``reader.Landing``."""
        return None, self._all_known()
