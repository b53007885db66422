"""Where a session's blocks are used: in the process's memory, here; on a device, ``device_ground``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from narrowboat.arena.device.interface import Device
from narrowboat.arena.slab import Slab
from narrowboat.plan.model import Machine
from narrowboat.plan.result import Plan
from narrowboat.stream.blocks import held_ranges, home
from narrowboat.stream.channel import Channel, HostChannel
from narrowboat.stream.memory_watch import MemoryWatch
from narrowboat.stream.reader import Reader
from narrowboat.stream.stopwatch import Stopwatch
from narrowboat.trace import Trace

if TYPE_CHECKING:
    from narrowboat.stream.prepare import Prepared


class Ground(Protocol):
    """What differs between sessions by where their blocks are used.

    Attributes:
        device: None for the processor.
        torch_device: of the weights.
        memory: what is held of the memory that the budget is of.
        stays: a resident block stays at its addresses when the plan changes.
        lock_memory: keep what is held from being swapped out.
    """

    device: Device | None
    torch_device: torch.device
    memory: Any
    stays: bool
    lock_memory: bool

    def chunk(self, most: int, workers: int) -> int:
        """Bytes per read call, of at most ``most``. Raises BudgetError: the host has no room for the buffers."""

    def connect(self, reader: Reader) -> Channel:
        """The way in, once there is a reader. Raises PinnedMemoryError, StorageError."""

    def machine(self, prepared: Prepared, bandwidth: float) -> Machine:
        """The planner's view, for a storage of so many bytes per second."""

    def stopwatch(self, timeline: Trace) -> Stopwatch:
        """What times passes."""

    def bases(self, plan: Plan) -> list[int | None]:
        """Where each block lies in the slab; None for one without a place."""

    def slab(self, plan: Plan) -> Any:
        """Memory for the plan's blocks. Raises DeviceMemoryError, StorageError."""

    def private(self, nbytes: int) -> Any:
        """Memory for a block beside the plan."""

    def adopt_buffers(self, module: nn.Module) -> None:
        """Have the buffers that are no weights where the weights will be."""

    def times(self, *, hold: bool) -> None:
        """Have the records of passes right, as far as that can be known now; wait for it if ``hold``."""

    def settled(self, plan: Plan, budget: int) -> None:
        """Passes have been measured; the plan stays, within so many bytes."""

    def named(self, error: Exception) -> Exception | None:
        """What to raise instead of an error of PyTorch's that is about the device; None if it is not."""

    def stats(self) -> dict[str, Any]:
        """For ``stats.collect``."""

    def close(self) -> None:
        """The reader is closed, and so is the slab."""


class HostGround(Ground):
    """In the process's own memory.

    Args:
        baseline: its resident bytes before.
        lock_memory: keep the arena from being swapped out.
    """

    device = None
    torch_device = torch.device("cpu")
    stays = True

    def __init__(self, baseline: int, *, lock_memory: bool) -> None:
        self.memory = MemoryWatch(baseline)
        self.lock_memory = lock_memory

    def chunk(self, most: int, workers: int) -> int:
        """See ``Ground``."""
        return most

    def connect(self, reader: Reader) -> Channel:
        """See ``Ground``."""
        return HostChannel(reader)

    def machine(self, prepared: Prepared, bandwidth: float) -> Machine:
        """See ``Ground``."""
        return prepared.machine(bandwidth)

    def stopwatch(self, timeline: Trace) -> Stopwatch:
        """See ``Ground``."""
        return Stopwatch(timeline)

    def bases(self, plan: Plan) -> list[int | None]:
        """See ``Ground``. Resident blocks lie at home; the window follows."""
        homes, streamed = home(plan), set(plan.streamed)
        return [
            homes[-1] + plan.offsets[i] if i in streamed else homes[i] if i in plan.resident else None
            for i in range(len(plan.blocks))
        ]

    def slab(self, plan: Plan) -> Slab:
        """See ``Ground``."""
        # Twice the weights in addresses, not in memory: each block's home, and the window after them.
        slab = Slab(2 * plan.weight_bytes, lock=self.lock_memory, populate=False)
        slab.hold(held_ranges(plan), behind=True)
        return slab

    def private(self, nbytes: int) -> Slab:
        """See ``Ground``."""
        return Slab(nbytes)

    def adopt_buffers(self, module: nn.Module) -> None:
        """See ``Ground``."""

    def times(self, *, hold: bool) -> None:
        """See ``Ground``."""

    def settled(self, plan: Plan, budget: int) -> None:
        """See ``Ground``."""

    def named(self, error: Exception) -> Exception | None:
        """See ``Ground``."""
        return None

    def stats(self) -> dict[str, Any]:
        """See ``Ground``."""
        return {
            "device": "cpu",
            "host_cache_bytes": 0,
            "host_budget_bytes": 0,
            "pinned_bytes": 0,
            "device_copied_bytes": 0,
            "copy_bytes_per_s": 0.0,
            "device_direct_refusal": "",
        }

    def close(self) -> None:
        """See ``Ground``."""
