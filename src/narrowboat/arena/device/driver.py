"""The calls of the CUDA driver that the arena needs, over ``cuda.bindings`` 12.x or 13.x, with errors that have names.

PyTorch has no way to map memory behind addresses or to pin memory that exists already; everything else of a device is
left to it. Its runtime and these calls share each device's primary context, so streams and addresses of one are good
in the other.

A thread's current context is PyTorch's business: which device new tensors go to follows from it. Each call here makes
its own context current only for as long as it lasts, and only if it is not current already.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from narrowboat.errors import (
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    DriverTooOldError,
    NoDeviceError,
    PinnedMemoryError,
)
from narrowboat.quantities import format_bytes

LEAST_VERSION = 11000  # as cuDriverGetVersion counts: 1000 * major + 10 * minor
_LEGACY_STREAM = 1  # CU_STREAM_LEGACY
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
_PORTABLE, _DEVICEMAP = 1, 2  # CU_MEMHOSTREGISTER_*

# Numbers of CUresult; the runtime's cudaError_t, which PyTorch reports, has the same ones for all of these.
OUT_OF_MEMORY = 2
_NONE = frozenset({3, 34, 46, 100, 101, 102, 802, 805, 807, 808, 809})
_OLD = frozenset({36, 227, 801, 803, 804})
# After these nothing works any more in this process: documented so, or the context is gone.
_LOST = frozenset({4, 201, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721, 806, 810, 911, 999})

_forked = False
_watching_forks = False


def kind_of(code: int) -> type[DeviceError]:
    """The error that stands for a driver's or runtime's result, which is not success."""
    if code == OUT_OF_MEMORY:
        return DeviceMemoryError
    for codes, kind in ((_NONE, NoDeviceError), (_OLD, DriverTooOldError), (_LOST, DeviceLostError)):
        if code in codes:
            return kind
    return DeviceError


_ADVICE: dict[type[DeviceError], str] = {
    DeviceMemoryError: "lower the budget, or end what else uses the device",
    PinnedMemoryError: "lower the budget for cpu, or raise `ulimit -l`",
    NoDeviceError: "`nvidia-smi` and `narrowboat doctor` say more; a forked process cannot use CUDA: spawn it",
    DriverTooOldError: "update the NVIDIA driver",
    DeviceLostError: "this process cannot use the device any more: start it anew; CUDA_LAUNCH_BLOCKING=1 shows why",
}


def failure(
    code: int,
    name: str,
    *,
    doing: str,
    memory: Callable[[], tuple[int, int]] | None = None,
    pinned: bool = False,
) -> DeviceError:
    """What to raise for a result that is not success.

    Args:
        code: of the result.
        name: of the result.
        doing: what was asked for, as in "cannot ...".
        memory: asks for ``(free, total)`` bytes, to say them where there was too little.
        pinned: host memory was to be pinned, and whatever refuses that is about host memory.
    """
    kind = kind_of(code)
    if pinned and kind is not DeviceLostError:
        kind = PinnedMemoryError
    found = ""
    if kind is DeviceMemoryError and memory is not None:
        with contextlib.suppress(DeviceError):
            free, total = memory()
            found = f"; {format_bytes(free)} of {format_bytes(total)} are free"
    advice = f"; {_ADVICE[kind]}" if kind in _ADVICE else ""
    return kind(f"cannot {doing}: {name} ({code}){found}{advice}")


def check(
    result: Any, *, doing: str, memory: Callable[[], tuple[int, int]] | None = None, pinned: bool = False
) -> Any:
    """What a call of ``cuda.bindings.driver`` gave: nothing, a value, or a tuple of values.

    Args:
        result: a tuple that starts with the ``CUresult``.
        doing, memory, pinned: see ``failure``.

    Raises:
        DeviceError: one of those below it, if the call failed.
    """
    status, *values = result if isinstance(result, tuple) else (result,)
    code = int(status)
    if code:
        raise failure(code, getattr(status, "name", "CUresult"), doing=doing, memory=memory, pinned=pinned)
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def bindings() -> ModuleType:
    """``cuda.bindings.driver``.

    Raises:
        NoDeviceError: it is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoDeviceError(
            f"CUDA needs NVIDIA's bindings for Python, and they cannot be imported ({error}): "
            "pip install 'narrowboat[cuda]'"
        ) from error
    module: ModuleType = driver
    return module


def _after_fork() -> None:
    global _forked
    _forked = True


def check_fork() -> None:
    """Before anything is asked of the driver.

    Raises:
        NoDeviceError: this process was forked from one that uses it.
    """
    if _forked:
        raise NoDeviceError(
            "this process was forked from one that uses CUDA, and CUDA does not survive a fork: start it with the "
            "method 'spawn'"
        )


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a device can do.

    Attributes:
        version: of CUDA that the driver supports, 1000 * major + 10 * minor.
        virtual_memory: addresses and memory can be apart.
        integrated: it shares the host's memory.
        maps_host: it can use pinned host memory in place.
        pageable: it can use any host memory in place.
        rdma: other devices may write into memory that is mapped.
    """

    version: int
    virtual_memory: bool
    integrated: bool
    maps_host: bool
    pageable: bool
    rdma: bool


class Driver:
    """The driver, for one device. Thread-safe, as the driver is.

    Args:
        index: of the device among the visible ones; PyTorch counts them alike.
        module: stands in for ``cuda.bindings.driver`` in tests.

    Raises:
        NoDeviceError: no bindings, no driver, no such device, or this is a forked child of a process that uses it.
        DriverTooOldError: the driver is from before CUDA 11.
    """

    def __init__(self, index: int, module: Any = None) -> None:
        global _watching_forks
        self.index = index
        self._module = module or bindings()
        self._call("cuInit", 0, doing="start the CUDA driver")
        version = int(self._call("cuDriverGetVersion", doing="ask for the driver's version"))
        if version < LEAST_VERSION:
            raise DriverTooOldError(
                f"the driver supports CUDA {version_name(version)}, and {version_name(LEAST_VERSION)} is needed: "
                "update the NVIDIA driver"
            )
        count = int(self._call("cuDeviceGetCount", doing="count devices"))
        if not 0 <= index < count:
            raise NoDeviceError(f"there is no device cuda:{index}: the driver shows {count} (CUDA_VISIBLE_DEVICES)")
        self._device = self._call("cuDeviceGet", index, doing=f"open cuda:{index}")
        if not _watching_forks:
            _watching_forks = True
            os.register_at_fork(after_in_child=_after_fork)
        # Kept until the process ends: it is PyTorch's, and goes with the process anyway.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device, doing=f"use cuda:{index}")
        self._current = int(self._context)
        self.abilities = Abilities(
            version,
            virtual_memory=bool(self._attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
            integrated=bool(self._attribute("INTEGRATED")),
            maps_host=bool(self._attribute("CAN_MAP_HOST_MEMORY")),
            pageable=bool(self._attribute("PAGEABLE_MEMORY_ACCESS")),
            rdma=bool(self._attribute("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED")),
        )
        self._property: Any = None
        self._access: Any = None

    # -- calling -----------------------------------------------------------------------------------

    def _call(self, name: str, *arguments: Any, doing: str, **how: Any) -> Any:
        check_fork()
        try:
            result = getattr(self._module, name)(*arguments)
        except AttributeError as error:
            raise NoDeviceError(f"the CUDA bindings have no {name}: pip install -U 'narrowboat[cuda]'") from error
        except RuntimeError as error:  # what the bindings raise for a library, or a function in it, that is not there
            first = str(error).partition("\n")[0]
            if "Function" in first:
                raise DriverTooOldError(f"cannot {doing}: {first}; {_ADVICE[DriverTooOldError]}") from error
            raise NoDeviceError(f"cannot {doing}: {first}") from error
        except (ValueError, KeyError) as error:  # a result that is newer than the bindings
            raise DeviceError(f"cannot {doing}: the driver gave a result without a name ({error})") from error
        return check(result, doing=doing, **how)

    def _on(self, name: str, *arguments: Any, doing: str, **how: Any) -> Any:
        """The same with the device's context current."""
        if int(self._call("cuCtxGetCurrent", doing=doing)) == self._current:
            return self._call(name, *arguments, doing=doing, **how)
        self._call("cuCtxPushCurrent", self._context, doing=doing)
        try:
            return self._call(name, *arguments, doing=doing, **how)
        finally:
            self._call("cuCtxPopCurrent", doing=doing)

    def _let_go(self, name: str, *arguments: Any, doing: str) -> None:
        # While the interpreter ends, modules are taken apart; the end of the process gives everything back.
        if not sys.is_finalizing():
            self._on(name, *arguments, doing=doing)

    def _attribute(self, name: str) -> int:
        """0 also for one that the driver does not know."""
        attribute = getattr(self._module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        status, value = self._module.cuDeviceGetAttribute(attribute, self._device)
        return int(value) if int(status) == 0 else 0

    # -- memory ------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """``(free, total)`` bytes."""
        free, total = self._on("cuMemGetInfo", doing="ask for free memory")
        return int(free), int(total)

    def _describe(self) -> None:
        if self._property is not None:
            return
        if not self.abilities.virtual_memory:
            raise DriverTooOldError(
                f"cuda:{self.index} or its driver (CUDA {version_name(self.abilities.version)}) has no virtual memory "
                "management (CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is 0): update the NVIDIA driver"
            )
        module = self._module
        made = module.CUmemAllocationProp()
        made.type = module.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        made.location.type = module.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        made.location.id = self.index
        if self.abilities.rdma:
            made.allocFlags.gpuDirectRDMACapable = 1
        access = module.CUmemAccessDesc()
        access.location.type = module.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.index
        access.flags = module.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._access, self._property = access, made

    def granularity(self) -> int:
        """Bytes of which every chunk and address is a multiple.

        Raises:
            DriverTooOldError: the device has no virtual memory management.
        """
        self._describe()
        flags = self._module.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(self._on("cuMemGetAllocationGranularity", self._property, flags, doing="ask for the granularity"))

    def reserve(self, nbytes: int) -> int:
        """Addresses without memory; returns the first."""
        self._describe()
        doing = f"reserve {format_bytes(nbytes)} of addresses"
        return int(self._on("cuMemAddressReserve", nbytes, 0, 0, 0, doing=doing, memory=self.memory))

    def unreserve(self, address: int, nbytes: int) -> None:
        """Give back what ``reserve`` gave, all of it."""
        self._let_go("cuMemAddressFree", address, nbytes, doing=f"give back {format_bytes(nbytes)} of addresses")

    def map(self, address: int, nbytes: int) -> Any:
        """Create memory, map it, and let the device read and write it; returns its handle.

        Raises:
            DeviceMemoryError: there is no such memory free. Whatever is raised, nothing is mapped.
        """
        doing, memory = f"have {format_bytes(nbytes)} more of device memory", self.memory
        handle = self._on("cuMemCreate", nbytes, self._property, 0, doing=doing, memory=memory)
        try:
            self._on("cuMemMap", address, nbytes, 0, handle, 0, doing=doing, memory=memory)
            try:
                self._on("cuMemSetAccess", address, nbytes, [self._access], 1, doing=doing, memory=memory)
            except BaseException:
                self._undo("cuMemUnmap", address, nbytes)
                raise
        except BaseException:
            self._undo("cuMemRelease", handle)
            raise
        return handle

    def _undo(self, name: str, *arguments: Any) -> None:
        with contextlib.suppress(DeviceError):  # the first error says more
            self._on(name, *arguments, doing="undo")

    def unmap(self, address: int, nbytes: int, handle: Any) -> None:
        """Give back what ``map`` gave; if that is refused, the handle stays good."""
        self._let_go("cuMemUnmap", address, nbytes, doing=f"unmap {format_bytes(nbytes)} of device memory")
        self._let_go("cuMemRelease", handle, doing=f"give back {format_bytes(nbytes)} of device memory")

    # -- host memory -------------------------------------------------------------------------------

    def register(self, address: int, nbytes: int) -> None:
        """Pin host memory, for every context, and have the device see it.

        Raises:
            PinnedMemoryError: refused.
        """
        doing = f"pin {format_bytes(nbytes)} of host memory"
        self._on("cuMemHostRegister", address, nbytes, _PORTABLE | _DEVICEMAP, doing=doing, pinned=True)

    def unregister(self, address: int) -> None:
        """Give back what ``register`` pinned."""
        self._let_go("cuMemHostUnregister", address, doing="unpin host memory")

    def device_address(self, address: int) -> int:
        """Where the device sees the start of pinned host memory."""
        doing = "use pinned host memory in place"
        return int(self._on("cuMemHostGetDevicePointer", address, 0, doing=doing, pinned=True))

    # -- streams and copies ------------------------------------------------------------------------

    def create_stream(self) -> int:
        """A stream that does not wait for the default one; returns its handle."""
        return int(self._on("cuStreamCreate", _NON_BLOCKING, doing="create a stream", memory=self.memory))

    def destroy_stream(self, handle: int) -> None:
        """Give it back; what was given to it still runs."""
        self._let_go("cuStreamDestroy", handle, doing="give a stream back")

    def copy_in(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Give a stream a copy from pinned host memory; it is 0 for the default stream, as in PyTorch."""
        self._copy("cuMemcpyHtoDAsync", target, source, nbytes, stream)

    def copy_out(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Give a stream a copy to pinned host memory."""
        self._copy("cuMemcpyDtoHAsync", target, source, nbytes, stream)

    def copy_within(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Give a stream a copy within the device."""
        self._copy("cuMemcpyDtoDAsync", target, source, nbytes, stream)

    def _copy(self, name: str, target: int, source: int, nbytes: int, stream: int) -> None:
        # 0 means another stream if CUDA_PYTHON_CUDA_PER_THREAD_DEFAULT_STREAM is set; PyTorch's is the legacy one.
        doing = f"copy {format_bytes(nbytes)}"
        self._on(name, target, source, nbytes, stream or _LEGACY_STREAM, doing=doing, memory=self.memory)


def version_name(version: int) -> str:
    """``"13.0"`` for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
