"""A device's memory as what a training budget counts: bytes of its allocator over a baseline.

The budget's net is the allocator's own: while the passes run, it may take no more from the device than what was
there before training and the budget. It gives back what it keeps of freed tensors before it refuses, and a refusal is
an error that the step repairs. The optimizer's step runs without the net, as it could not be made again in less.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from narrowboat.arena.device.interface import Device
from narrowboat.errors import DeviceMemoryError
from narrowboat.quantities import format_bytes
from narrowboat.train.device.allocator import Allocator, CudaAllocator
from narrowboat.train.device.emulated import CountingAllocator
from narrowboat.train.measure.clock import Clock, DeviceClock
from narrowboat.train.plan import TrainPlan
from narrowboat.train.static import StaticBytes, batch_bytes, model_bytes
from narrowboat.train.tape.frames import Takes

log = logging.getLogger("narrowboat")
_LOOKS = 20  # in a row with room, before a budget grows
_SHARE = 0.85  # of what could be had, for "auto"
_WORTH = 0.02  # of the budget is worth a change of plan


class DeviceFollower:
    """See ``budget.Follower``: all that a device has free counts. Others that use it too have to leave it free.

    Args:
        ceiling: bytes; more would be of no use.
    """

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._roomy: list[int] = []

    def wanted(self, now: int, spare: int, pressure: float) -> tuple[int, str] | None:
        """See ``Follower``."""
        target, cause = max(1, min(spare, self._ceiling)), f"{format_bytes(spare)} can be had on the device"
        self._roomy = [*self._roomy, target] if target > now * (1 + _WORTH) else []
        if len(self._roomy) >= _LOOKS:
            # The least of the looks: a gap between two neighbours' peaks is no room.
            least, self._roomy = min(self._roomy), []
            return least, cause
        return (target, cause) if target < now * (1 - _WORTH) else None


class NoGuard:
    """Where the allocator itself sees to the limit."""

    watches = False

    def before(self, takes: Takes) -> None:
        """Nothing to do."""

    def end(self, nbytes: int) -> None:
        """Nothing to do."""


class DeviceMemory:
    """See ``memory.MeasuredMemory`` and ``budget.Machine``.

    Args:
        device: where model, batch and activations are.
        allocator: which gives its memory to tensors.
        model, optimizer: what is trained.
        enforce: limit the allocator while the passes run.
    """

    on_host = False

    def __init__(
        self,
        device: Device,
        allocator: Allocator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        enforce: bool,
    ) -> None:
        self._device, self._allocator, self._enforce = device, allocator, enforce
        self._model, self._optimizer = model, optimizer
        self.clock: Clock = DeviceClock(device)
        self.slack, self.workspace = allocator.slack, device.workspace
        self._base: int | None = None
        self._reserved_base = self._before = 0

    # -- as the machine of a budget ------------------------------------------------------------------------------

    def auto(self) -> int:
        """See ``budget.Machine``."""
        found = int((self._free() + self._there()) * _SHARE)
        log.info("budget auto: %s of %s", format_bytes(found), self._device.name)
        return found

    def follower(self, ceiling: int) -> DeviceFollower:
        """See ``budget.Machine``."""
        return DeviceFollower(ceiling)

    def check(self, budget: int) -> None:
        """Refuse a budget that the device has no memory for.

        Raises:
            DeviceMemoryError: with what was asked for and what is free.
        """
        free, total = self._device.memory()
        spare = free + max(0, self._allocator.reserved() - self._base_or_others())
        if budget > spare:
            raise DeviceMemoryError(
                f"a budget of {format_bytes(budget)} was asked for, and {self._device.name} has {format_bytes(free)} "
                f"free of {format_bytes(total)} ({format_bytes(spare)} with what the model has there): lower the "
                "budget for cuda, or end what else uses the device"
            )

    def _there(self) -> int:
        return model_bytes(self._model, self._optimizer, self._device.torch_device.type)

    def _base_or_others(self) -> int:
        """Bytes that others in this process have."""
        return max(0, self._allocator.allocated() - self._there()) if self._base is None else self._base

    # -- as what is measured -------------------------------------------------------------------------------------

    def begin(self, inputs: Any, targets: Any) -> None:
        """See ``MeasuredMemory``."""
        self._allocator.begin(leaf for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, torch.Tensor))
        if self._base is not None:
            return
        gc.collect()
        self._allocator.give_back()
        held = self._there() + batch_bytes(inputs, targets, self._device.torch_device.type)
        self._base = max(0, self._allocator.allocated() - held)
        self._reserved_base = max(self._base, self._allocator.reserved() - held)

    def held(self) -> int:
        """See ``MeasuredMemory``."""
        return max(0, self._allocator.allocated() - (self._base or 0))

    def peak(self) -> int:
        """See ``MeasuredMemory``."""
        return max(0, self._allocator.peaks()[0] - (self._base or 0))

    def reserved_peak(self) -> int:
        """See ``MeasuredMemory``."""
        return max(0, self._allocator.peaks()[1] - self._reserved_base)

    def reset_peak(self) -> None:
        """See ``MeasuredMemory``."""
        self._allocator.reset_peaks()

    def before_measuring(self) -> None:
        """See ``MeasuredMemory``."""
        gc.collect()
        self._before = self._allocator.allocated()

    def left_behind(self) -> int:
        """See ``MeasuredMemory``: workspaces of cuBLAS above all, which stay for as long as the process."""
        gc.collect()
        return max(0, self._allocator.allocated() - self._before)

    def spare(self, static: StaticBytes) -> int:
        """See ``MeasuredMemory``."""
        return self._free() + static.weights + static.buffers + static.batch

    def could_hold(self) -> tuple[int, float]:
        """See ``MeasuredMemory``; nobody tells how long others wait for a device's memory."""
        return self._free() + self.held(), 0.0

    def _free(self) -> int:
        kept = max(0, self._allocator.reserved() - self._allocator.allocated())
        return self._device.memory()[0] + kept

    def tidy(self) -> None:
        """See ``MeasuredMemory``."""
        self._allocator.give_back()

    def give_back(self) -> None:
        """See ``MeasuredMemory``."""
        self._allocator.give_back()

    @contextmanager
    def guarded(self, plan: TrainPlan, budget: int) -> Iterator[NoGuard]:
        """See ``MeasuredMemory``."""
        allowed = self._reserved_base + min(budget, plan.budget)
        with self._allocator.limited(allowed if self._enforce else None):
            yield NoGuard()

    def close(self) -> None:
        """See ``MeasuredMemory``."""


def memory_of(device: Device, model: nn.Module, optimizer: torch.optim.Optimizer, *, enforce: bool) -> DeviceMemory:
    """The memory of a device, by the allocator that it has."""
    if device.torch_device.type == "cuda":
        allocator: Allocator = CudaAllocator(device.torch_device, device.memory()[1])
    else:
        allocator = CountingAllocator(model, optimizer)
    return DeviceMemory(device, allocator, model, optimizer, enforce=enforce)
