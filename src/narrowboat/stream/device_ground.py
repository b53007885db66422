"""Blocks on a device, with memory of its own or with the host's."""

from __future__ import annotations

import logging
import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from narrowboat.arena.device import gds
from narrowboat.arena.device.cuda import named
from narrowboat.arena.device.gds import GdsReader
from narrowboat.arena.device.interface import Device
from narrowboat.arena.device.slab import DeviceSlab, InPlaceSlab
from narrowboat.errors import PinnedMemoryError
from narrowboat.plan.model import Machine
from narrowboat.plan.result import Plan
from narrowboat.stream.channel import Channel
from narrowboat.stream.device_channel import DeviceChannel, InPlaceChannel
from narrowboat.stream.device_watch import DeviceWatch
from narrowboat.stream.ground import Ground
from narrowboat.stream.host_cache import HostCache
from narrowboat.stream.reader import Reader
from narrowboat.stream.staging import Staging, staging_chunk
from narrowboat.stream.stopwatch import DeviceStopwatch, Stopwatch
from narrowboat.trace import Trace

if TYPE_CHECKING:
    from narrowboat.stream.prepare import Prepared

_PROBE_SECONDS = 0.02  # of copying
_PROBES = 5
_LEAST_CACHE = 1 << 16  # bytes
log = logging.getLogger("narrowboat")


def _straight(reader: Reader, device: Device) -> tuple[str, list[GdsReader]]:
    """What reads each file straight into the device; or why that cannot be."""
    reason = next((why for file in reader.files if (why := gds.probe(file.path, device))), "")
    return reason, [] if reason else [GdsReader(file.path, device) for file in reader.files]


class DeviceGround(Ground):
    """On a device.

    Args:
        device: which.
        host_bytes: of pinned memory: buffers between storage and device, and the rest for a cache of weights; of no
            meaning where host and device share one memory.
        asked: somebody gave that number; else the cache may be smaller, where the system pins no more.

    Attributes:
        why_not_direct: why storage is not read straight into the device; empty where it is.
    """

    stays = False
    lock_memory = False

    def __init__(self, device: Device, host_bytes: int, *, asked: bool = True) -> None:
        self.device: Device = device
        self.torch_device = device.torch_device
        self.host_bytes = 0 if device.unified else host_bytes
        self.memory = DeviceWatch(device, self._mapped)
        self._slabs: list[Any] = []  # the arena, and blocks beside the plan
        self._channel: DeviceChannel | InPlaceChannel | None = None
        self._watch: DeviceStopwatch | None = None
        self._asked = asked
        self.why_not_direct = "host and device share one memory"
        self._chunk = 0
        self._bandwidth = 0.0
        self._fraction: float | None = None

    def _mapped(self) -> int:
        self._slabs = [slab for slab in self._slabs if slab.mapped_bytes]
        return sum(slab.mapped_bytes for slab in self._slabs)

    def chunk(self, most: int, workers: int) -> int:
        """See ``Ground``."""
        self._chunk = most if self.device.unified else staging_chunk(self.host_bytes, workers, most)
        return self._chunk

    def connect(self, reader: Reader) -> Channel:
        """See ``Ground``."""
        if self.device.unified:
            self._channel = InPlaceChannel(reader, self.device)
            return self._channel
        staging = Staging(self.device, reader.chunk, reader.workers)
        try:
            cache = self._cache(self.host_bytes - staging.nbytes)
        except BaseException:
            staging.close()
            raise
        self.why_not_direct, direct = _straight(reader, self.device)
        self._channel = DeviceChannel(reader, self.device, staging, cache, direct)
        return self._channel

    def _cache(self, nbytes: int) -> HostCache:
        while True:
            try:
                return HostCache(self.device, nbytes)
            except PinnedMemoryError as error:
                if self._asked or nbytes < _LEAST_CACHE:
                    raise
                log.warning("%s; half of that is tried, as no budget for cpu was given", error)
                nbytes //= 2

    def machine(self, prepared: Prepared, bandwidth: float) -> Machine:
        """See ``Ground``. Copies and reads are other engines' work: kernels are not slowed by them."""
        known = replace(prepared.machine(bandwidth), contention=0.0)
        if not isinstance(self._channel, DeviceChannel):
            return known
        self._bandwidth = self._bandwidth or self._copy_bandwidth(self._channel)
        return replace(known, copy_bandwidth=self._bandwidth, host_room=self._channel.cache.nbytes, chunk=self._chunk)

    def _copy_bandwidth(self, channel: DeviceChannel) -> float:
        """Bytes per second from pinned memory to the device: the median of a few copies."""
        source = channel.staging.slab
        nbytes = min(source.nbytes, 64 << 20)
        free = self.device.memory()[0]
        scratch = DeviceSlab(self.device, min(nbytes, max(free // 4, self.device.granularity)))
        nbytes = min(nbytes, scratch.nbytes)
        rates: list[float] = []
        try:
            size = min(nbytes, 1 << 20)
            for _ in range(_PROBES + 1):
                begin = channel.copies.record(timed=True)
                self.device.copy_in(scratch.address, source.address, size, channel.copies)
                end = channel.copies.record(timed=True)
                end.wait()
                rates.append(size / max(end.seconds_since(begin), 1e-9))
                size = max(min(nbytes, int(rates[-1] * _PROBE_SECONDS)), 1 << 16)
        finally:
            scratch.close()
        return statistics.median(rates[1:])

    def stopwatch(self, timeline: Trace) -> Stopwatch:
        """See ``Ground``."""
        self._watch = DeviceStopwatch(timeline, self.device)
        return self._watch

    def bases(self, plan: Plan) -> list[int | None]:
        """See ``Ground``. The window, then the resident blocks, with no chunk in part unused but the last."""
        placed = plan.resident.union(plan.streamed)
        return [plan.offsets[i] if i in placed else None for i in range(len(plan.blocks))]

    def slab(self, plan: Plan) -> Any:
        """See ``Ground``."""
        if isinstance(self._channel, DeviceChannel):
            self.device.synchronize()  # the cache's places are given to others
            self._channel.cache.arrange([block.nbytes for block in plan.blocks], plan.cached)
        return self._made(plan.arena_bytes)

    def private(self, nbytes: int) -> Any:
        """See ``Ground``."""
        return self._made(nbytes)

    def _made(self, nbytes: int) -> Any:
        nbytes = max(nbytes, 1)
        slab: Any
        if self.device.unified:
            slab = InPlaceSlab(self.device, nbytes)
        else:  # in one chunk: all of it comes and goes together
            slab = DeviceSlab(self.device, nbytes, chunk=nbytes)
        self._slabs.append(slab)
        return slab

    def adopt_buffers(self, module: nn.Module) -> None:
        """See ``Ground``."""
        if self.torch_device.type == "cpu":
            return
        moved: dict[int, torch.Tensor] = {}
        for child in module.modules():
            for name, buffer in child._buffers.items():
                if buffer is not None and name in child._non_persistent_buffers_set and buffer.device.type != "meta":
                    child._buffers[name] = moved.setdefault(id(buffer), buffer.to(self.torch_device))

    def times(self, *, hold: bool) -> None:
        """See ``Ground``."""
        assert self._watch is not None
        self._watch.read(hold=hold)

    def settled(self, plan: Plan, budget: int) -> None:
        """See ``Ground``. From now on the allocator gets what the plan leaves, and no more."""
        assert self._watch is not None
        self._watch.watching = False
        if self.torch_device.type != "cuda":
            return
        if self._fraction is None:
            known = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)
            self._fraction = float(known(self.torch_device))
        allowed = self.memory.baseline + max(budget - plan.arena_bytes, self.memory.beside)
        total = self.device.memory()[1]
        torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0), self.torch_device)

    def named(self, error: Exception) -> Exception | None:
        """See ``Ground``."""
        return named(error, self.device.memory) if isinstance(error, RuntimeError) else None

    def stats(self) -> dict[str, Any]:
        """See ``Ground``."""
        channel = self._channel
        cache = channel.cache if isinstance(channel, DeviceChannel) else None
        pinned = channel.staging.nbytes + channel.cache.nbytes if isinstance(channel, DeviceChannel) else 0
        return {
            "device": self.device.name,
            "host_cache_bytes": cache.held if cache is not None else 0,
            "host_budget_bytes": self.host_bytes,
            "pinned_bytes": self._mapped() if self.device.unified else pinned,
            "device_copied_bytes": channel.bytes_copied if channel is not None else 0,
            "copy_bytes_per_s": self._bandwidth,
            "device_direct_refusal": self.why_not_direct,
        }

    def close(self) -> None:
        """See ``Ground``."""
        if self._fraction is not None:
            torch.cuda.set_per_process_memory_fraction(self._fraction, self.torch_device)
        if self._channel is not None:
            self._channel.close()
