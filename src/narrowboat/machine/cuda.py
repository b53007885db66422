"""Whether torch can use a CUDA device. torch is imported only when asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One device: its name, total bytes and free bytes of memory."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class CudaSupport:
    """The devices torch can use, or why it can use none.

    Attributes:
        devices: usable devices.
        reason: why there is none; empty if there is one.
    """

    devices: tuple[CudaDevice, ...]
    reason: str


def cuda_support() -> CudaSupport:
    """Ask torch for its CUDA devices."""
    try:
        import torch
    except ImportError as error:
        return CudaSupport((), f"torch cannot be imported: {error}")
    if torch.version.cuda is None and torch.version.hip is None:
        return CudaSupport((), f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return CudaSupport((), "torch is built with CUDA, but finds no driver or no device")
    devices: list[CudaDevice] = []
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            return CudaSupport((), f"CUDA device {index} does not answer: {str(error).splitlines()[0]}")
        devices.append(CudaDevice(torch.cuda.get_device_name(index), total, free))
    return CudaSupport(tuple(devices), "")
