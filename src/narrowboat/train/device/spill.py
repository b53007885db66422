"""Activations of a device: copied to pinned host memory beside the computing, back before they are wanted.

What the pinned memory has no room for goes on from there to storage. The host waits for the device nowhere here in a
step that goes as planned; what has to come one after the other is ordered on the device, by events. There are two
streams beside the one that computes, one for each way.

[Note: memory of the device] A storage that leaves is held here until its copy's event is done. Where more bytes wait
than may be under way, the stream on which it was made waits for that event instead (not the host), and it is let go of
at once: torch's allocator gives memory anew on the stream it was made on, so whatever takes its place comes after the
copy. A storage that arrives is made on the computing stream, and the copy into it waits for that stream first, as the
kernels of its last tenant may be running still. ``record_stream`` is not used: it would leave the moment at which
memory comes back to chance.

[Note: slots] A slot may be given anew while the device still reads from it: the stream of copies out waits for the
last copy in then. Host threads, which write to slots what comes from storage, wait for both streams.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from narrowboat.arena.device.interface import Device, Event
from narrowboat.errors import DeviceError, DeviceLostError, SpillError
from narrowboat.machine.data_limit import is_out_of_memory
from narrowboat.quantities import format_bytes
from narrowboat.train.device.pinned import PinnedRoom
from narrowboat.train.device.tickets import Arriving, Place, Ticket
from narrowboat.train.device.under_way import Arrivals, Departures
from narrowboat.train.spill import SpillPool
from narrowboat.train.spill_slots import PAGE, rounded

log = logging.getLogger("narrowboat")
_ROUNDING = 16  # of so many bytes one goes to whole pages, at the most: smaller storages are not spilled
_LEAST_ROOM = 1 << 20  # bytes beyond what was asked for, for the same reason


class DeviceSpillPool:
    """Storages of a device's tensors, kept in pinned host memory and on storage.

    As with ``train.spill.SpillPool``: the bytes of a storage given to :meth:`write` must not change until they are
    copied; what :meth:`read` gives may be that same storage. Calls may come from any thread; :meth:`release` never
    waits. Kernels that use what :meth:`read` gave have to be given to the calling thread's stream.

    Args:
        device: whose tensors.
        host_bytes: the most that may be pinned.
        behind: for what does not fit, in host memory by then; None for no storage. Closed with this pool.
        in_flight: bytes of the device's memory that the pool may hold in storages leaving or read ahead. One that is
            asked for without having been read ahead is not counted.

    Attributes:
        host_bytes: the most that may be pinned, whole pages.
        holds_most: ``in_flight``.
        bytes_offloaded: copied to pinned memory so far.
        seconds_waiting: how long callers have waited, for storage in the end.
    """

    def __init__(self, device: Device, host_bytes: int, behind: SpillPool | None = None, *, in_flight: int) -> None:
        self._device, self._behind = device, behind
        self.host_bytes, self.holds_most = host_bytes // PAGE * PAGE, in_flight
        self._out, self._in = device.stream("spill-out"), device.stream("spill-in")
        self._last_out: Event | None = None
        self._last_in: Event | None = None
        self._cold = False  # a slot is free from which a copy in may still be reading
        self._room = PinnedRoom(device)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._freed: deque[Place] = deque()
        self._in_slots: dict[Place, None] = {}  # in the order of writing, about the opposite of that of reading
        self._leaving, self._arriving = Departures(), Arrivals()
        self._moving = self._fetching = 0  # what the threads have to do
        self._pass_beyond = 0  # bytes of a pass that the room cannot hold
        self._beyond = 0  # bytes of places that are on storage, or on their way
        self._known: dict[str, object] = {}  # to the threads, of the device, when they freed a slot
        self._failure: Exception | None = None  # of the storage
        self._broken: DeviceError | None = None
        self._closed = False
        self.bytes_offloaded = 0
        self.seconds_waiting = 0.0
        self._mover = ThreadPoolExecutor(1, "narrowboat-spill-mover")
        self._reader = ThreadPoolExecutor(1, "narrowboat-spill-fetcher")

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def room_for(self) -> int:
        """Bytes of spilled storages that pinned memory has room for, as far as plans count on it."""
        return self.host_bytes * _ROUNDING // (_ROUNDING + 1)

    @property
    def bytes_written(self) -> int:
        """Bytes given to storage so far."""
        return self._behind.bytes_written if self._behind is not None else 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned."""
        return self._room.nbytes

    @property
    def bytes_in_slots(self) -> int:
        """Bytes of pinned memory that hold something, in whole pages."""
        with self._lock:
            self._settle()
            return self._room.taken

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of the device's memory held on behalf of the pool now."""
        with self._lock:
            self._settle()
            return self._holding()

    def ensure(self, nbytes: int) -> None:
        """Have room for so many bytes at one time: pin what is needed, and reserve the rest in the folder.

        Raises:
            SpillError: there is no such room, or storage has failed.
            PinnedMemoryError: pinning is refused.
            StorageError: the host has no such memory.
        """
        wanted = min(self.host_bytes, nbytes + nbytes // _ROUNDING + _LEAST_ROOM)
        with self._lock:
            self._check()
            self._rest()
            if wanted > self._room.nbytes and not self._in_slots:
                self._pin(wanted)
            self._expect(nbytes)
            if not self._pass_beyond:
                return
            if self._behind is None:
                raise SpillError(
                    f"{format_bytes(nbytes)} of activations do not fit into {format_bytes(self.host_bytes)} of pinned "
                    "host memory: raise the budget for cpu, or give a folder (spill=)"
                )
            self._check_storage()
        self._behind.ensure(self._pass_beyond)

    def expect(self, nbytes: int) -> None:
        """So many bytes will be spilled at one time in the passes that follow; there is room for them (``ensure``)."""
        with self._lock:
            self._expect(nbytes)

    def start(self) -> None:
        """Its threads start when they are needed; no limit on the host's data counts their stacks."""

    # -- for the tape --------------------------------------------------------------------------------------------

    def write(self, storage: torch.UntypedStorage) -> Ticket:
        """Give the device a copy of ``storage`` to pinned memory.

        Waits only where pinned memory is full and something has to go on to storage first. Where nothing can, the
        storage stays on the device.

        Raises:
            SpillError: pinned memory is full and storage has failed (what was spilled is still there), not memory of
                the device, or the pool is closed.
        """
        if storage.device != self._device.torch_device:
            raise SpillError(f"only memory of {self._device.torch_device} is spilled here, not of {storage.device}")
        with self._lock:
            self._check()
            self._settle()
            ticket = Ticket(storage.nbytes(), self._freed)
            place = ticket._place
            if place.nbytes == 0:
                return ticket
            place.offset = self._slot_for(place.nbytes)
            if place.offset is None:
                log.info("%s stay on the device: no room in pinned memory", format_bytes(place.nbytes))
                place.kept = storage
                return ticket
            self._send_out(place, storage)
            self._in_slots[place] = None
            if self._beyond < self._pass_beyond and self._failure is None:
                self._move_on(place)  # early: what is spilled first is wanted last
            return ticket

    def prefetch(self, ticket: Ticket) -> bool:
        """Begin to bring ``ticket`` back, if the bytes in flight leave room; False if they do not. Never waits.

        Raises:
            SpillError: the pool is closed, or the ticket was released.
        """
        with self._lock:
            self._check(ticket)
            self._settle()
            place = ticket._place
            if place in self._arriving or place.kept is not None or place.nbytes == 0:
                return True
            if place.original is not None:
                self._arriving.add(place, Arriving(place.original))
                return True
            if self._holding() + place.nbytes > self.holds_most:
                return False
            try:
                self._arriving.add(place, self._bring(place))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return False  # by the time it is asked for, something else may have gone
            return True

    def read(self, ticket: Ticket) -> torch.UntypedStorage:
        """The bytes of ``ticket``: a storage that is the caller's alone, or the one given to :meth:`write`.

        The calling thread's stream waits for them; the host does only where they come from storage. The ticket stays
        valid. Bytes handed over no longer count as in flight.

        Raises:
            SpillError: the storage cannot be read, the pool is closed, or the ticket was released.
            torch.OutOfMemoryError: the device has no memory for them.
            MemoryError: the host has none.
        """
        with self._lock:
            self._check(ticket)
            self._settle()
            place = ticket._place
            arriving = self._arriving.take(place)
            if arriving is None:
                if place.original is not None:
                    return place.original
                if place.nbytes == 0:
                    return self._fresh(0)
                arriving = self._bring(place)
        # The lock is left: the thread that reads needs it.
        if arriving.fetch is not None:
            self._take(arriving.storage, arriving.fetch)
        if arriving.event is not None:
            self._device.compute().wait(arriving.event)
        return arriving.storage

    def release(self, ticket: Ticket) -> None:
        """Free what holds ``ticket``.

        May be called from a finalizer, twice, and after :meth:`close`. Dropping the ticket does the same.
        """
        ticket._release()
        # Whoever holds the lock, perhaps this very thread further up, frees it at the next call.
        if not self._closed and self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    # -- between steps -------------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Wait until nothing is under way; the pool holds none of the device's memory then but what had no room."""
        with self._lock:
            if not self._closed:
                self._rest()

    def close(self) -> None:
        """End the threads and let everything go, ``behind`` too. A second call does nothing."""
        with self._lock:
            already, self._closed = self._closed, True
        if already:
            return
        for lane in (self._mover, self._reader):
            lane.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            with suppress(DeviceLostError):  # nothing is under way there any more
                self._out.synchronize()
                self._in.synchronize()
            self._learn()
            self._leaving, self._arriving = Departures(), Arrivals()
            self._in_slots.clear()
            self._room.close()
        if self._behind is not None:
            self._behind.close()

    def __enter__(self) -> DeviceSpillPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- under the lock ------------------------------------------------------------------------------------------

    def _check(self, ticket: Ticket | None = None) -> None:
        if self._closed:
            raise SpillError("the spill pool of the device is closed; what it held is gone")
        if self._broken is not None:
            raise self._broken
        if ticket is not None and ticket.released:
            raise SpillError("a spilled storage was asked for after it was released")

    def _check_storage(self) -> None:
        if self._failure is not None:
            raise SpillError(str(self._failure)) from self._failure

    def _expect(self, nbytes: int) -> None:
        self._pass_beyond = max(0, nbytes - self.room_for)

    def _holding(self) -> int:
        return self._leaving.nbytes + self._arriving.nbytes

    def _settle(self) -> None:
        while self._freed:
            self._drop(self._freed.popleft())
        self._leaving.settle()
        self._arriving.settle()

    def _drop(self, place: Place) -> None:
        place.dead = True
        place.kept = place.leaving = None  # a copy out that is under way has the original in ``_leaving``
        self._fetching -= self._arriving.forget(place)
        if not place.moving:
            self._vacate(place)

    def _vacate(self, place: Place) -> None:
        if place.offset is not None:
            self._room.give(place.offset, place.nbytes)
            self._in_slots.pop(place, None)
            place.offset, self._cold = None, self._last_in is not None
        if place.dead and place.beyond:
            self._beyond -= place.nbytes
            place.beyond, place.stored = False, None

    def _slot_for(self, nbytes: int) -> int | None:
        """The offset of a slot to copy out to; None where there is no room and none can be made."""
        if rounded(nbytes) > self.host_bytes:
            return None
        if not self._room.nbytes:
            self._pin(self.host_bytes)  # nobody has told how much will come
        begin = time.perf_counter()
        while (offset := self._room.take(nbytes)) is None:
            if self._behind is None:
                return None
            self._check_storage()
            if not self._moving:
                # By now that is also what nobody thought would be beyond.
                oldest = next(iter(self._in_slots), None)
                if oldest is None:
                    return None
                self._move_on(oldest)
            self._changed.wait()
            self._settle()
        self.seconds_waiting += time.perf_counter() - begin
        self._learn()
        return offset

    def _pin(self, nbytes: int) -> None:
        self._room.resize(nbytes)
        self._known["pinned"] = self._device.hand_over()

    def _learn(self) -> None:
        # The lock has put the calling thread after the others.
        for known in self._known.values():
            self._device.take_over(known)

    def _send_out(self, place: Place, storage: torch.UntypedStorage) -> None:
        assert place.offset is not None
        stream = self._device.compute()
        if self._cold and self._last_in is not None:
            self._out.wait(self._last_in)
            self._cold = False
        self._out.wait(stream.record())
        address = self._room.address(place.offset)
        self._device.copy_out(address, storage.data_ptr(), place.nbytes, self._out)
        place.out = self._last_out = self._out.record()
        place.leaving = self._leaving.add(storage, place.out, stream)
        self.bytes_offloaded += place.nbytes
        self._leaving.shrink(max(0, self.holds_most - self._arriving.nbytes))

    def _bring(self, place: Place) -> Arriving:
        """Have the device, or the thread that reads, begin to bring the bytes to a storage of their own."""
        arriving = Arriving(self._fresh(place.nbytes))
        ready = self._device.compute().record()
        if place.offset is None:
            self._fetching += 1
            arriving.fetch = self._reader.submit(self._fetch, place, arriving, ready)
            return arriving
        assert place.out is not None
        place.read = True
        self._in.wait(ready)
        self._in.wait(place.out)
        self._copy_in(arriving, place.offset)
        return arriving

    def _copy_in(self, arriving: Arriving, offset: int) -> None:
        target = arriving.storage
        self._device.copy_in(target.data_ptr(), self._room.address(offset), target.nbytes(), self._in)
        arriving.event = self._last_in = self._in.record()

    def _move_on(self, place: Place) -> None:
        place.moving = place.beyond = True
        self._moving += 1
        self._beyond += place.nbytes
        self._mover.submit(self._carry, place)

    def _prove_own(self, place: Place) -> None:
        """Nobody but the calling thread has used the slot since its copy out: told as a write, that is proved."""
        try:
            if place.offset is not None and not place.read:
                self._device.host_writes(self._room.address(place.offset), place.nbytes)
        except DeviceError as error:
            self._broken = error

    def _rest(self) -> None:
        self._settle()
        while self._moving or self._fetching:
            self._changed.wait()
        self._out.synchronize()
        self._in.synchronize()
        self._learn()
        self._settle()

    # -- without it ----------------------------------------------------------------------------------------------

    def _fresh(self, nbytes: int) -> torch.UntypedStorage:
        with torch.inference_mode(False), torch.no_grad():
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device.torch_device).untyped_storage()

    def _take(self, target: torch.UntypedStorage, fetch: Future[torch.UntypedStorage | None]) -> None:
        begin = time.perf_counter()
        left = fetch.result()
        if left is not None:
            _bytes_of(target).copy_(_bytes_of(left))
        self.seconds_waiting += time.perf_counter() - begin

    def _carry(self, place: Place) -> None:
        """The mover's work: from a slot to storage."""
        assert self._behind is not None and place.out is not None and place.offset is not None
        stored, failure = None, None
        try:
            place.out.wait()
            if not place.dead:
                stored = self._behind.write(self._room.storage(place.offset, place.nbytes))
                self._behind.finish(stored)
        except Exception as error:
            failure = error
        with self._lock:
            self._moving -= 1
            place.moving = False
            if stored is not None and failure is None:
                place.stored = stored
                self._prove_own(place)
                self._vacate(place)
            elif failure is not None:
                self._failure = self._failure or failure
                self._broken = self._broken or (failure if isinstance(failure, DeviceError) else None)
                place.beyond = False
                self._beyond -= place.nbytes
            if place.dead:
                self._vacate(place)
            self._known["mover"] = self._device.hand_over()
            self._changed.notify_all()

    def _fetch(self, place: Place, arriving: Arriving, ready: Event) -> torch.UntypedStorage | None:
        """The reading thread's work: from storage to a slot, and a copy in; the bytes where no slot is free."""
        offset = None
        try:
            stored = place.stored
            if stored is None:  # released
                return None
            assert self._behind is not None
            data = self._behind.read(stored)
            with self._lock:
                offset = self._room.take(place.nbytes)
                waits = self._last_out, self._last_in
                self._learn()
            if offset is None:
                return data
            for event in waits:
                if event is not None:
                    event.wait()
            address = self._room.address(offset)
            self._device.host_writes(address, place.nbytes)
            ctypes.memmove(address, data.data_ptr(), place.nbytes)
            with self._lock:
                self._in.wait(ready)
                self._copy_in(arriving, offset)
            return None
        finally:
            with self._lock:
                if offset is not None:
                    self._room.give(offset, place.nbytes)
                    self._known["reader"] = self._device.hand_over()
                    self._cold = True
                self._fetching -= 1
                self._changed.notify_all()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
