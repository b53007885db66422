"""Where a child computes: on a GPU through PyTorch, or on the emulated device, whose tensors are the processor's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from narrowboat.arena.device.cuda import CudaDevice
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.interface import Device
from narrowboat.errors import NoDeviceError
from narrowboat.machine.cuda import cuda_support


class Place:
    """One device, for measuring.

    Args:
        spec: ``"cuda"``, ``"cuda:1"``, or an emulated device as ``open_device`` takes it.

    Attributes:
        is_cuda: it is a GPU.
        torch_device: of its tensors.
        budget_name: what budgets call it.

    Raises:
        NoDeviceError: there is no GPU that torch can use.
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.is_cuda = spec.startswith("cuda")
        self.torch_device = torch.device(spec) if self.is_cuda else torch.device("cpu")
        self.budget_name = "cuda" if self.is_cuda else "emulated"
        if self.is_cuda:
            if not torch.cuda.is_available():
                raise NoDeviceError(cuda_support().reason)
            self.torch_device = torch.device("cuda", self.torch_device.index or 0)
            torch.cuda.set_device(self.torch_device)

    def open(self) -> Device:
        """narrowboat's device."""
        return open_device(self.spec)

    def open_unified(self) -> Device:
        """The same taken for one that shares the host's memory, whatever it is."""
        if self.is_cuda:
            return CudaDevice(self.torch_device.index or 0, unified=True)
        return EmulatedDevice(self.open().memory()[1], unified=True)

    def settle(self) -> None:
        """Wait until the device has nothing left to do."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def timed(self, call: Callable[[], Any]) -> tuple[float, float | None]:
        """Seconds from the call to its answer, by the clock, and by CUDA's events around it.

        The stream on which the answer is computed is waited for, and not the others: what is copied ahead for the next
        pass is no part of this one.
        """
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start, None
        stream = torch.cuda.current_stream(self.torch_device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream.synchronize()
        start = time.perf_counter()
        begin.record(stream)
        call()
        end.record(stream)
        stream.synchronize()
        return time.perf_counter() - start, begin.elapsed_time(end) / 1e3

    def held(self) -> int | None:
        """Bytes that are not free, by the driver; None for an emulated device, which is each process's own."""
        if not self.is_cuda:
            return None
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return int(total - free)

    def total(self) -> int:
        """Bytes of the device."""
        if self.is_cuda:
            return int(torch.cuda.mem_get_info(self.torch_device)[1])
        return int(self.open().memory()[1])

    def reset_peaks(self) -> None:
        """Begin the allocator's peaks anew."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peaks(self) -> tuple[int, int] | None:
        """Most bytes that PyTorch's allocator gave to tensors, and most it took from the driver; None without it."""
        if not self.is_cuda:
            return None
        device = self.torch_device
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)

    def reserved(self) -> int:
        """Bytes that PyTorch's allocator has from the driver now; 0 without a GPU."""
        return torch.cuda.memory_reserved(self.torch_device) if self.is_cuda else 0

    def empty(self) -> None:
        """Have the allocator give back what it keeps."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.empty_cache()
