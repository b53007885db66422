"""A device without a GPU: a second host slab, and a copy thread with a bandwidth, under the rules of the real thing.

Its memory is a file in memory, so what is unmapped is really given back, and its tensors are tensors of the CPU, so
models run on it bit for bit as they do there. Copies take the time that a bus of the given bandwidth would, and the
bytes of a target are spoiled when its copy begins: what is used too early is not right by luck. Every copy, and every
use that is told of, is proved to be ordered (``order``); ``arena.device.access.AccessWatch`` tells of operators'.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import cast

import torch

from narrowboat.arena.device.dlpack import tensor_at
from narrowboat.arena.device.interface import Stream
from narrowboat.arena.device.lanes import ComputeLane, CopyLane, LaneEvent, host_agent
from narrowboat.arena.device.order import Clock, Order
from narrowboat.arena.pool import PagePool, map_nothing, map_pool
from narrowboat.arena.slab import Slab
from narrowboat.errors import DeviceMemoryError, DeviceOrderError, NoDeviceError, PinnedMemoryError, UsageError
from narrowboat.quantities import format_bytes

GRANULARITY = 64 << 10  # bytes
_NORESERVE = 0x4000
_SPOILED = 0xFF  # a NaN in every float format
_PIECE = 1 << 20  # bytes that are copied between two looks at the clock


class EmulatedDevice:
    """See ``interface.Device``.

    Args:
        capacity: bytes of its memory.
        bandwidth: bytes per second of a copy to it or from it; None: as fast as memory copies.
        granularity: of its chunks, a multiple of the page.
        unified: the host's memory is its own.
        pinnable: bytes of host memory that may be pinned; None: any.
        jitter: seed of short random delays before copies, so that threads meet in other ways.
        workspace: see ``interface.Device``.

    Attributes:
        order: where accesses are proved.
        busy_seconds: of copying.
        copied_in, copied_out: bytes.
    """

    def __init__(
        self,
        capacity: int = 1 << 30,
        *,
        bandwidth: float | None = None,
        granularity: int = GRANULARITY,
        unified: bool = False,
        pinnable: int | None = None,
        jitter: int | None = None,
        workspace: int = 0,
    ) -> None:
        if capacity <= 0 or (bandwidth is not None and not bandwidth > 0):
            raise UsageError(f"an emulated device has bytes and a bandwidth, not {capacity} and {bandwidth}")
        if granularity <= 0 or granularity % mmap.PAGESIZE:
            raise UsageError(f"granularity must be a multiple of {mmap.PAGESIZE}, not {granularity}")
        self.name = "emulated"
        self.torch_device = torch.device("cpu")
        self.unified = unified
        self.granularity = granularity
        self.workspace = workspace
        self.order = Order()
        self.busy_seconds = 0.0
        self.copied_in = self.copied_out = 0
        self._capacity = capacity // granularity * granularity
        self._taken = 0  # by others, see ``take``
        self._bandwidth, self._pinnable = bandwidth, pinnable
        self._chance = random.Random(jitter) if jitter is not None else None
        self._pool = PagePool(0)
        self._ranges: dict[int, mmap.mmap] = {}
        self._gone: list[mmap.mmap] = []  # their addresses are never anybody else's
        self._pinned: dict[int, int] = {}
        self._lanes: weakref.WeakSet[CopyLane] = weakref.WeakSet()
        self._numbers = itertools.count()
        self._pid = os.getpid()
        self._left: deque[LaneEvent] = deque()  # the ends of streams that nobody holds any more
        self._closings: deque[Callable[[], None]] = deque()
        self._compute = threading.local()
        self._computes: list[ComputeLane] = []
        self._lock = threading.Lock()

    # -- memory ------------------------------------------------------------------------------------

    def reclaim(self, close: Callable[[], None]) -> None:
        """See ``Device``. When the device is next asked for something: no order is proved in the middle of a proof."""
        self._closings.append(close)

    def _tidy(self) -> None:
        while self._closings and not self._forked:
            self.synchronize()
            self.order.learn_all(host_agent())  # what nobody refers to, nobody uses
            self._closings.popleft()()

    @property
    def _free(self) -> int:
        return self._capacity - self._taken - self._pool.nbytes

    def memory(self) -> tuple[int, int]:
        """See ``Device``."""
        self._tidy()
        return self._free, self._capacity

    def take(self, nbytes: int) -> None:
        """Another process takes device memory; or gives it back, if negative."""
        self._taken += nbytes

    def reserve(self, nbytes: int) -> int:
        """See ``Device``."""
        if self._forked:
            raise NoDeviceError(f"{self.name} was made in the process that this one was forked from: make another")
        self._tidy()
        place = mmap.mmap(-1, nbytes + self.granularity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(place))
        address = -(-start // self.granularity) * self.granularity
        self._ranges[address] = place
        self.order.mapping(host_agent(), address, nbytes, mapped=False)
        return address

    def unreserve(self, address: int, nbytes: int) -> None:
        """See ``Device``."""
        if self._forked:
            return  # the parent's
        self._gone.append(self._ranges.pop(address))

    def map(self, address: int, nbytes: int) -> object:
        """See ``Device``."""
        self._tidy()
        with self._lock:
            free = self._free
            if nbytes > free:
                raise DeviceMemoryError(
                    f"{self.name}: {format_bytes(nbytes)} more of device memory cannot be had: {format_bytes(free)} "
                    f"of {format_bytes(self._capacity)} are free; lower the budget, or end what else uses the device"
                )
            self._pool.resize(self._pool.nbytes + nbytes)
            extents = self._pool.take(nbytes)
        assert extents is not None
        map_pool(self._pool, address, extents)
        ctypes.memset(address, _SPOILED, nbytes)
        self.order.mapping(host_agent(), address, nbytes, mapped=True)
        return extents

    def unmap(self, address: int, nbytes: int, handle: object) -> None:
        """See ``Device``."""
        if self._forked:
            return  # the parent's
        self.order.mapping(host_agent(), address, nbytes, mapped=False)
        map_nothing(address, nbytes)
        with self._lock:
            self._pool.give(cast("list[tuple[int, int]]", handle))
            self._pool.resize(self._pool.nbytes - nbytes)

    # -- pinned memory -----------------------------------------------------------------------------

    def pin(self, slab: Slab) -> None:
        """See ``Device``."""
        with self._lock:
            already = sum(self._pinned.values())
            if self._pinnable is not None and already + slab.nbytes > self._pinnable:
                raise PinnedMemoryError(
                    f"{self.name}: cannot pin {format_bytes(slab.nbytes)} of host memory beside "
                    f"{format_bytes(already)}: lower the budget for cpu"
                )
            self._pinned[slab.address] = slab.nbytes
        self.order.mapping(host_agent(), slab.address, slab.nbytes, mapped=True)

    def unpin(self, slab: Slab) -> None:
        """See ``Device``."""
        if self._forked:
            return  # the parent's
        self.order.mapping(host_agent(), slab.address, slab.nbytes, mapped=True)  # nothing may still use it
        self.order.forget(slab.address, slab.nbytes)
        self._pinned.pop(slab.address, None)

    def in_place(self, slab: Slab) -> int:
        """See ``Device``."""
        return slab.address

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned."""
        self._tidy()
        return sum(self._pinned.values())

    # -- streams -----------------------------------------------------------------------------------

    def compute(self) -> ComputeLane:
        """See ``Device``. Each thread has its own, as with CUDA's per-thread default stream."""
        lane: ComputeLane | None = getattr(self._compute, "lane", None)
        if lane is None:
            with self._lock:
                lane = ComputeLane(self.order, f"compute stream {len(self._computes)}")
                self._computes.append(lane)
            self._compute.lane = lane
        return lane

    def stream(self, name: str) -> CopyLane:
        """See ``Device``."""
        lane = CopyLane(self.order, f"{name} {next(self._numbers)}", self._left)
        self._lanes.add(lane)
        return lane

    @property
    def _forked(self) -> bool:
        """Whether this is a child of the process that the device was made in: its streams did not come along."""
        return os.getpid() != self._pid

    def synchronize(self) -> None:
        """See ``Device``."""
        if self._forked:
            return
        while self._left:
            self._left.popleft().wait()
        for lane in list(self._lanes):
            lane.synchronize()
        for compute in list(self._computes):
            compute.synchronize()

    # -- copies ------------------------------------------------------------------------------------

    def copy_in(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See ``Device``."""
        self._require_pinned(source, nbytes)
        self._copy(target, source, nbytes, stream, "a copy in")
        self.copied_in += nbytes

    def copy_out(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See ``Device``."""
        self._require_pinned(target, nbytes)
        self._copy(target, source, nbytes, stream, "a copy out")
        self.copied_out += nbytes

    def copy_within(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See ``Device``."""
        self._copy(target, source, nbytes, stream, "a copy within")

    def _require_pinned(self, address: int, nbytes: int) -> None:
        if not any(low <= address and address + nbytes <= low + size for low, size in self._pinned.items()):
            raise DeviceOrderError(f"an asynchronous copy of host memory at {address:#x} that is not pinned")

    def _copy(self, target: int, source: int, nbytes: int, stream: Stream, what: str) -> None:
        lane = cast("CopyLane | ComputeLane", stream)

        def prove() -> None:
            self.order.read(lane.name, source, nbytes, what)
            self.order.write(lane.name, target, nbytes, what)

        if isinstance(lane, CopyLane):
            lane.give(prove, lambda: self._move(target, source, nbytes))
        else:
            lane.submit()
            prove()
            self._move(target, source, nbytes)

    def _move(self, target: int, source: int, nbytes: int) -> None:
        begin = time.perf_counter()
        if self._chance is not None:
            time.sleep(self._chance.random() ** 4 * 3e-3)
        ctypes.memset(target, _SPOILED, nbytes)
        for at in range(0, nbytes, _PIECE):
            part = min(_PIECE, nbytes - at)
            ctypes.memmove(target + at, source + at, part)
            if self._bandwidth is not None:
                ahead = (at + part) / self._bandwidth - (time.perf_counter() - begin)
                if ahead > 5e-5:
                    time.sleep(ahead)
        self.busy_seconds += time.perf_counter() - begin

    # -- tensors, and proofs -----------------------------------------------------------------------

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], owner: object) -> torch.Tensor:
        """See ``Device``."""
        return tensor_at(address, dtype, shape, self.torch_device, owner)

    def kernel_reads(self, address: int, nbytes: int) -> None:
        """See ``Device``."""
        lane = self.compute()
        lane.submit()
        self.order.read(lane.name, address, nbytes, "a kernel")

    def owns(self, address: int) -> bool:
        """Whether an address is one of the device's."""
        return any(low <= address < low + len(place) for low, place in self._ranges.items()) or any(
            low <= address < low + nbytes for low, nbytes in self._pinned.items()
        )

    def host_writes(self, address: int, nbytes: int) -> None:
        """See ``Device``."""
        self.order.write(host_agent(), address, nbytes, "a host thread")

    def hand_over(self) -> Clock:
        """See ``Device``."""
        return self.order.snapshot(host_agent())

    def take_over(self, token: object) -> None:
        """See ``Device``."""
        self.order.learn(host_agent(), cast(Clock, token))

    def __repr__(self) -> str:
        return f"<emulated device of {format_bytes(self._capacity)}>"
