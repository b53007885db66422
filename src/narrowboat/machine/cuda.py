"""Whether torch can use a CUDA device, and what is needed beside it. Nothing starts before it is asked for."""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass
from importlib import metadata

_INTEGRATED, _VIRTUAL_MEMORY = 18, 102  # CUdevice_attribute


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One device.

    Attributes:
        name: of the GPU.
        total, free: bytes of its memory.
        virtual_memory: addresses and memory can be apart, as narrowboat needs them; None: the driver does not say.
        integrated: it shares the host's memory; None: the driver does not say.
    """

    name: str
    total: int
    free: int
    virtual_memory: bool | None = None
    integrated: bool | None = None


@dataclass(frozen=True, slots=True)
class CudaSupport:
    """The devices torch can use, or why it can use none.

    Attributes:
        devices: usable devices.
        reason: why there is none; empty if there is one.
        driver: the newest CUDA that the driver supports, such as ``"13.0"``; empty if there is no driver.
        bindings: version of NVIDIA's bindings for Python; empty if they are not installed.
    """

    devices: tuple[CudaDevice, ...]
    reason: str
    driver: str = ""
    bindings: str = ""


def cuda_support() -> CudaSupport:
    """Ask torch and the driver for CUDA devices. Starts CUDA in this process if there is one."""
    bindings = _bindings()
    try:
        import torch
    except ImportError as error:
        return CudaSupport((), f"torch cannot be imported: {error}", bindings=bindings)
    if torch.version.cuda is None and torch.version.hip is None:
        return CudaSupport((), f"torch {torch.__version__} is built without CUDA", bindings=bindings)
    if getattr(torch.cuda, "_is_in_bad_fork", bool)():
        reason = "this process was forked from one that uses CUDA: start it with the method 'spawn'"
        return CudaSupport((), reason, bindings=bindings)
    library = _library()
    driver = _driver_version(library)
    if not torch.cuda.is_available():
        found = f"finds no device (the driver supports CUDA {driver})" if driver else "finds no driver"
        return CudaSupport((), f"torch is built with CUDA, but {found}", driver, bindings)
    devices: list[CudaDevice] = []
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            reason = f"CUDA device {index} does not answer: {str(error).splitlines()[0]}"
            return CudaSupport((), reason, driver, bindings)
        able, integrated = (_attribute(library, number, index) for number in (_VIRTUAL_MEMORY, _INTEGRATED))
        devices.append(CudaDevice(torch.cuda.get_device_name(index), total, free, able, integrated))
    return CudaSupport(tuple(devices), "", driver, bindings)


def _bindings() -> str:
    try:
        found = importlib.util.find_spec("cuda.bindings")
    except (ImportError, ValueError):  # no ``cuda`` at all, or an older package of that name
        return ""
    if found is None:
        return ""
    try:
        return metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _library() -> ctypes.CDLL | None:
    """The driver, not through its bindings: they may not be there."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _driver_version(library: ctypes.CDLL | None) -> str:
    value = ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(value)) != 0 or value.value == 0:
        return ""
    return f"{value.value // 1000}.{value.value % 1000 // 10}"


def _attribute(library: ctypes.CDLL | None, number: int, index: int) -> bool | None:
    device, value = ctypes.c_int(), ctypes.c_int()
    if (
        library is None
        or library.cuInit(0) != 0
        or library.cuDeviceGet(ctypes.byref(device), index) != 0
        or library.cuDeviceGetAttribute(ctypes.byref(value), number, device) != 0
    ):
        return None
    return value.value != 0
