"""The window: so many bytes of memory in which the weights of a training step take turns.

A weight is brought in when an operator touches it, and pinned while that runs. Everything happens in the thread that
touches: places are given, tenants let go, and reads ahead along the known order submitted; the reader's threads only
read. What is read ahead follows the four rules of Cao, Felten, Karlin and Li ("A study of integrated prefetching and
caching strategies", SIGMETRICS 1995): fetch what is needed next, let go what is needed latest, never let go what is
needed sooner than what comes, and do so at the first opportunity.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from narrowboat.arena.slab import PAGE, Slab
from narrowboat.arena.slot import Slot, Weight
from narrowboat.errors import BudgetError, NarrowboatError, SessionClosedError, StorageError
from narrowboat.machine.storage_choice import StorageChoice
from narrowboat.quantities import format_bytes
from narrowboat.stream.blocks import State
from narrowboat.stream.reader import Extent, Reader, WeightsFile
from narrowboat.trace import Trace
from narrowboat.train.weights.order import TouchOrder
from narrowboat.train.weights.places import PINNED
from narrowboat.train.weights.room import Room, Tenant, page_up

_STAGING_SHARE = 4  # the reader's staging buffers take at most this part of the bytes that one operator needs


class Window:
    """Brings weights in on demand and ahead of it; the owner (``arena.slot.WeightOwner``) of lazy stand-ins.

    Args:
        files: what the reader reads from; closed with the window.
        weights: all that may be touched.
        together: bytes of the largest set of weights that one operator is expected to touch.
        extents_of: where a weight's bytes lie now, for a target offset in the window.
        budget: bytes for the window and the reader's staging buffers.
        storage: how to read.
        staged: whether reads need staging buffers: some weight does not begin on a page of its file.

    Attributes:
        order: the touches recorded and expected.
        demanded: reads that an operator had to wait for, because they were not foreseen in time.
        escaped_bytes: bytes moved aside because somebody kept a view of a weight.
        on_pressed: called when what is held has to go; lets go of it.
        poison: for tests: after every operator all is let go and its bytes are overwritten with NaN.

    Raises:
        BudgetError: the budget is below ``minimum``.
    """

    def __init__(
        self,
        files: Sequence[WeightsFile],
        weights: Sequence[Weight],
        together: int,
        extents_of: Callable[[Weight, int], list[Extent]],
        budget: int,
        storage: StorageChoice,
        *,
        staged: bool,
    ) -> None:
        self.order = TouchOrder()
        self.demanded = 0
        self.escaped_bytes = 0
        self.poison = False
        self._files = list(files)
        self._extents_of = extents_of
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._tenants = {w.index: Tenant(w, page_up(w.entry.nbytes)) for w in weights if w.entry.nbytes}
        self._everything = sum(t.nbytes for t in self._tenants.values())
        self._together = max([together, *(t.nbytes for t in self._tenants.values())])
        chunk = storage.chunk
        if staged:
            share = self._together // _STAGING_SHARE // storage.depth
            chunk = min(storage.for_copies().chunk, max(share // PAGE - 2, 1) * PAGE)
        self.timeline = Trace()
        self._reader = Reader(files, chunk=chunk, workers=storage.depth, trace=self.timeline)
        self._staging = self._reader.staging_bytes if staged else 0
        self._budget = budget
        self._ahead = 0  # the next touches, of which this many are provided for
        self._reading: list[Tenant] = []
        self._held: list[Tenant] = []
        self.on_pressed: Callable[[], None] = lambda: None
        self._torn = False
        self.closed = ""
        high = self._size(budget)
        self._room = Room(self._tenants.values(), high, self._together)
        self._slab = Slab(max(self._everything, PAGE), populate=False)
        self._slab.hold([(0, high)] if high else [], behind=True)
        for weight in weights:
            weight.owner = self
        # The reader's threads would outlive a model that is dropped without being closed.
        weakref.finalize(self, self._reader.close, wait=False)

    # -- bytes -------------------------------------------------------------------------------------

    @property
    def minimum(self) -> int:
        """The smallest budget in bytes that serves every operator seen so far, and those expected."""
        return min(self._together, self._everything) + self._staging

    @property
    def budget(self) -> int:
        """Bytes for the window and the reader's staging buffers; to be set between steps.

        Raises:
            BudgetError: it is below ``minimum``; the one in force stays.
        """
        return self._budget

    @budget.setter
    def budget(self, nbytes: int) -> None:
        with self._lock:
            self.on_pressed()
            high, before, low = self._size(nbytes), self._room.high, self._room.low
            if high < before:
                self._drop_reads()
                if high - low < min(self._together, self._everything - low):
                    self._forget()
                    self._room.no_homes()
                for tenant in [t for t in self._room.guests if t.offset + t.nbytes > high]:
                    self._evict(tenant)
                self._slab.release([(high, before - high)])
            elif high > before:
                self._slab.hold([(before, high - before)], behind=True)
            self._room.high, self._budget = high, nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the window and the staging buffers take."""
        return self._room.high + self._staging

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights that are in memory, or on their way."""
        return sum(t.nbytes for t in self._tenants.values() if t.state is not State.OUT)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of the window that were in use at once."""
        return self._room.peak

    @property
    def bytes_read(self) -> int:
        """Bytes that have been read, over all time."""
        return self._reader.bytes_read

    def _size(self, budget: int) -> int:
        high = min((budget - self._staging) // PAGE * PAGE, self._everything)
        if high < min(self._together, self._everything):
            raise BudgetError(
                f"{format_bytes(budget)} for weights on storage is not enough: one operator needs "
                f"{format_bytes(self.minimum)}, staging included; raise the budget to that",
                minimum=self.minimum,
                limiter="weights that one operator uses",
            )
        return high

    # -- steps -------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """A training step begins: its touches are recorded.

        Raises:
            WeightsChangedError: a weights file was replaced, altered or truncated.
        """
        with self._lock:
            for file in self._files:
                file.check_path()
                file.check_open_file()
            self.order.begin_step()
            self._ahead = 0

    def end_step(self) -> None:
        """The step is over as a whole: the next one is expected to be like it, and its first weights are read."""
        with self._lock:
            self.order.end_step()
            self._ahead = 0
            self._read_ahead()

    # -- operators ---------------------------------------------------------------------------------

    @contextmanager
    def touching(self, weights: list[Weight]) -> Iterator[Callable[[Slot], torch.Tensor]]:
        """Within the context the weights are in; yields what gives the tensor over the window for a slot.

        Operators of several threads run one after the other.

        Raises:
            SessionClosedError: nobody is left to load them.
            BudgetError: the window cannot hold them together.
            WeightsChangedError, StorageError: they cannot be read.
        """
        with self._lock:
            tenants = self._enter(weights)
            try:
                yield self._view
            except BaseException:
                self._unpin(tenants)  # frames of the traceback may refer to views: nothing is to be moved aside
                raise
            self._unpin(tenants)
            for tenant in tenants:
                if tenant.view is not None and torch._C._storage_Use_Count(tenant.storage._cdata) > 2:
                    self._rescue(tenant)
            if self.poison:
                self._overwrite()

    def place_of(self, weight: Weight) -> memoryview:
        """The whole pages of a weight that is being touched, by reference; empty if it has no bytes."""
        tenant = self._tenants.get(weight.index)
        if tenant is None:
            return memoryview(b"")
        assert tenant.pins and tenant.state is State.IN
        return self._slab.bytes_at(tenant.offset, tenant.nbytes)

    def fresh_view(self, weight: Weight) -> torch.Tensor:
        """Another tensor over the bytes of a weight that is being touched, with a storage object of its own."""
        tenant = self._tenants.get(weight.index)
        if tenant is None:
            return torch.empty(weight.entry.shape, dtype=weight.entry.dtype)
        assert tenant.pins and tenant.state is State.IN
        return self._slab.tensor(tenant.offset, weight.entry.dtype, weight.entry.shape)

    def hold(self, weights: Iterable[Weight]) -> None:
        """Keep weights that are being touched where they are, until ``let_go`` of them; ``on_pressed`` may be called
        before, when there is no room for others."""
        tenants = [self._tenants[weight.index] for weight in weights if weight.index in self._tenants]
        for tenant in tenants:
            assert tenant.pins and tenant not in self._held
            tenant.pins += 1
            self._held.append(tenant)

    def let_go(self, weights: Iterable[Weight]) -> None:
        """They need not stay any more."""
        with self._lock:
            for weight in weights:
                tenant = self._tenants.get(weight.index)
                if tenant is not None and tenant in self._held:
                    self._held.remove(tenant)
                    tenant.pins -= 1

    def drop(self, weights: Iterable[Weight]) -> None:
        """Forget the bytes of weights that nobody touches: they are read anew."""
        with self._lock:
            for weight in weights:
                tenant = self._tenants.get(weight.index)
                if tenant is not None and tenant.pins == 0:
                    self._evict(tenant)

    def _view(self, slot: Slot) -> torch.Tensor:
        tenant = self._tenants.get(slot.weight.index)
        if tenant is None:  # it has no bytes
            return torch.empty(slot.weight.entry.shape, dtype=slot.weight.entry.dtype)
        if tenant.view is None:
            entry = tenant.weight.entry
            tenant.view = self._slab.tensor(tenant.offset, entry.dtype, entry.shape)
            tenant.storage = tenant.view.untyped_storage()
        return tenant.view.requires_grad_(slot.tensor.requires_grad)

    def _enter(self, weights: list[Weight]) -> list[Tenant]:
        if self.closed:
            raise SessionClosedError(self.closed)
        if os.getpid() != self._pid:
            raise SessionClosedError(
                "this process was forked from the one that trains the model, and the reader of its weights did not "
                "come along: start workers with the 'spawn' method"
            )
        if self._torn:
            self._forget()
        found = dict.fromkeys(self._tenants[w.index] for w in weights if w.index in self._tenants)
        tenants = list(found)
        self._torn = True  # until it is done: an interruption may strike anywhere
        for tenant in tenants:
            tenant.pins += 1
        try:
            self._bring(tenants)
        except NarrowboatError:
            self._unpin(tenants)
            self._torn = False
            raise
        self._torn = False
        return tenants

    @staticmethod
    def _unpin(tenants: list[Tenant]) -> None:
        for tenant in tenants:
            tenant.pins -= 1

    def _bring(self, tenants: list[Tenant]) -> None:
        self._settle()
        before = self.order.pos
        departed = self.order.departures
        for tenant in tenants:
            self.order.touch(tenant.weight.index)
        self._ahead = 0 if self.order.departures > departed else max(self._ahead - (self.order.pos - before), 0)
        if any(tenant.state is State.OUT for tenant in tenants):
            self._make_place(tenants)
            for tenant in tenants:
                if tenant.state is State.OUT:
                    self.demanded += 1
                    self._submit(tenant, urgent=True)
        self._read_ahead()
        for tenant in tenants:
            self._finish(tenant)

    # -- moving ------------------------------------------------------------------------------------

    def _make_place(self, tenants: list[Tenant]) -> None:
        """Give a place to those of an operator's weights that are out."""
        if self._all_placed(tenants):
            return
        if self._held:
            self.on_pressed()
            if self._all_placed(tenants):
                return
        # What the operator needs lies so that the rest does not fit between: all of it anew, side by side.
        for tenant in list(self._room.guests):
            if tenant.pins - (tenant in tenants) == 0:
                self._evict(tenant)
        if not self._all_placed(tenants):
            together = sum(t.nbytes for t in tenants)
            self._together = max(self._together, together)
            raise BudgetError(
                f"one operator uses {len(tenants)} weights of {format_bytes(together)} together, "
                f"{tenants[0].weight.name!r} the first, and the window of {format_bytes(self._room.high)} cannot "
                f"hold them: raise the budget to {format_bytes(self.minimum)}",
                minimum=self.minimum,
                limiter=tenants[0].weight.name,
            )

    def _all_placed(self, tenants: list[Tenant]) -> bool:
        return all(tenant.state is not State.OUT or self._give_place(tenant) for tenant in tenants)

    def _give_place(self, tenant: Tenant, beyond: float = -1.0) -> bool:
        """Find a place for a weight that is out, and let go those that are there. Nobody needed within ``beyond``."""
        return self._room.enter(tenant, self._farness, self._evict, beyond)

    def _farness(self, tenant: Tenant) -> float:
        return PINNED if tenant.pins else self.order.farness(tenant.weight.index)

    def _read_ahead(self) -> None:
        """Submit reads of what will be touched next, as far as places go without harm."""
        count = len(self.order.known)
        while self._ahead < count:
            tenant = self._tenants.get(self.order.expected(self._ahead))
            if tenant is not None and tenant.state is State.OUT:
                in_flight = sum(t.nbytes for t in self._reading)
                if self._reading and in_flight + tenant.nbytes > self._room.high // 2:
                    return
                if not self._give_place(tenant, beyond=self._ahead):
                    return
                self._submit(tenant)
            self._ahead += 1

    def _submit(self, tenant: Tenant, *, urgent: bool = False) -> None:
        extents = self._extents_of(tenant.weight, tenant.offset)
        tenant.job = self._reader.submit(tenant.weight.name, self._slab, extents, urgent=urgent)
        tenant.state = State.READING
        self._reading.append(tenant)

    def _settle(self) -> None:
        """Note the outcome of reads that have ended."""
        ended = [t for t in self._reading if t.job is not None and t.job.done]
        for file in self._files if ended else ():
            file.check_open_file()
        for tenant in ended:
            assert tenant.job is not None
            if tenant.job.error is not None:
                self._evict(tenant)  # read ahead in vain: an operator that needs it tries again, and says so
            else:
                self._reading.remove(tenant)
                tenant.state = State.IN

    def _finish(self, tenant: Tenant) -> None:
        """Wait until a weight is in. Raises the read's error if it fails twice."""
        for last_try in (False, True):
            if tenant.state is State.IN:
                return
            assert tenant.job is not None
            try:
                self._reader.wait(tenant.job)
                for file in self._files:
                    file.check_open_file()
            except NarrowboatError as error:
                # A read ahead may have met a trouble that is over: once more, now.
                if last_try or not isinstance(error, StorageError):
                    self._evict(tenant)
                    raise
                self._reading.remove(tenant)
                self._submit(tenant, urgent=True)
            else:
                self._reading.remove(tenant)
                tenant.state = State.IN

    def _evict(self, tenant: Tenant) -> None:
        if tenant.state is State.READING and tenant.job is not None:
            self._reader.cancel(tenant.job)
            with contextlib.suppress(NarrowboatError):
                self._reader.wait(tenant.job)
        if tenant in self._reading:
            self._reading.remove(tenant)
        self._room.leave(tenant)

    def _drop_reads(self) -> None:
        for tenant in list(self._reading):
            self._evict(tenant)
        self._ahead = 0

    def _forget(self) -> None:
        """After an interruption nothing that was noted is trusted."""
        self.on_pressed()
        self._held.clear()
        self._reader.drain()
        self._reading.clear()
        self._room.empty()
        self._ahead = 0
        self._torn = False

    def _rescue(self, tenant: Tenant) -> None:
        """Somebody kept a view of a weight: its storage, and with it every alias, gets memory of its own."""
        storage = tenant.storage
        with torch.inference_mode(False):
            if hasattr(storage, "_swap_data_ptr_"):
                storage._swap_data_ptr_(storage.clone())
            else:  # public, but the memory comes from /dev/shm, which containers keep small
                storage.share_memory_()
        self.escaped_bytes += int(storage.nbytes())
        tenant.view = tenant.storage = None

    def _overwrite(self) -> None:
        self._drop_reads()
        for tenant in [t for t in self._tenants.values() if t.state is State.IN and not t.pins]:
            offset = tenant.offset
            self._evict(tenant)
            ctypes.memset(self._slab.address + offset, 0xFF, tenant.nbytes)

    def close(self, reason: str) -> None:
        """Give the memory back. What touches a weight from then on is told ``reason``."""
        with self._lock:
            if self.closed:
                return
            self.closed = reason
            if os.getpid() != self._pid:
                return  # a forked child: the reader's threads do not exist here, and waiting for them never ends
            self._drop_reads()
            self._forget()
            self._reader.close()
            for file in self._files:
                file.close()
            self._slab.close()
