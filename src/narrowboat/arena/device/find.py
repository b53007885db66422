"""Which device a caller means."""

from __future__ import annotations

import threading
from typing import Any, cast

import torch

from narrowboat.arena.device.cuda import CudaDevice
from narrowboat.arena.device.emulated import GRANULARITY, EmulatedDevice
from narrowboat.arena.device.interface import Device
from narrowboat.errors import NoDeviceError, UsageError
from narrowboat.machine.cuda import cuda_support
from narrowboat.machine.device_name import parse_device

_opened: dict[int, CudaDevice] = {}
_lock = threading.Lock()


def open_device(spec: Any) -> Device:
    """The device that is meant: one object per GPU, however often it is asked for.

    Args:
        spec: ``"cuda"`` (the current one), ``"cuda:1"``, a ``torch.device``, or an object that is a ``Device``. For
            trying things out without a GPU, ``"emulated:CAPACITY"``, ``"emulated:CAPACITY:BANDWIDTH"`` or with the
            size of its chunks besides, in bytes and bytes per second: ``"emulated:6GiB:12GB"``; a new one each time.

    Raises:
        NoDeviceError: there is none such, and why.
        DriverTooOldError: the driver or the GPU lacks virtual memory management.
        UsageError: no name of an accelerator.
    """
    if not isinstance(spec, (str, torch.device)):
        if all(hasattr(spec, name) for name in ("torch_device", "compute", "reserve", "copy_in")):
            return cast(Device, spec)
        raise UsageError(f"device {spec!r} is no device: give 'cuda', 'cuda:1' or a torch.device")
    if isinstance(spec, str) and spec.startswith("emulated"):
        return _emulated(spec)
    try:
        wanted = torch.device(spec)
    except RuntimeError as error:
        raise UsageError(f"device {spec!r} is no device: give 'cuda' or 'cuda:1'") from error
    if wanted.type != "cuda":
        raise UsageError(f"device {spec!r} is not supported: give 'cuda' or 'cuda:1'")
    if not torch.cuda.is_available():
        raise NoDeviceError(f"device {str(spec)!r} cannot be used: {cuda_support().reason}")
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    with _lock:
        if index not in _opened:
            _opened[index] = CudaDevice(index)
        return _opened[index]


def _emulated(spec: str) -> Device:
    try:
        choice = parse_device(spec)
    except ValueError as error:
        raise UsageError(f"device {error}") from error
    bandwidth = float(choice.bandwidth) if choice.bandwidth is not None else None
    return EmulatedDevice(choice.capacity, bandwidth=bandwidth, granularity=choice.granularity or GRANULARITY)
