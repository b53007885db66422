"""An NVIDIA GPU: PyTorch's streams and events, and the driver's virtual memory (``driver``).

PyTorch's caching allocator has addresses and memory of its own, and knows nothing of what is mapped here; the two
meet only in the driver's count of free memory. Nothing here waits for the device unless its caller says so: unlike
``cudaFree``, unmapping does not.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, cast

import torch

from narrowboat.arena.device.dlpack import tensor_at
from narrowboat.arena.device.driver import OUT_OF_MEMORY, Driver, check_fork, failure
from narrowboat.arena.device.interface import Event, Stream
from narrowboat.arena.slab import Slab
from narrowboat.errors import DeviceError, DeviceLostError, DriverTooOldError, NoDeviceError, UsageError
from narrowboat.machine.cuda import cuda_support

_WORKSPACE = 40 << 20
# Before torch 2.8 an error has no number, only the driver's sentence.
_SENTENCES = {
    "out of memory": OUT_OF_MEMORY,
    "CUBLAS_STATUS_ALLOC_FAILED": OUT_OF_MEMORY,
    "Cannot re-initialize CUDA in forked subprocess": 3,
    "initialization error": 3,
    "no CUDA-capable device": 100,
    "invalid device ordinal": 101,
    "driver shutting down": 4,
    "context is destroyed": 709,
    "uncorrectable ECC": 214,
    "uncorrectable NVLink": 220,
    "illegal memory access": 700,
    "launch timed out": 702,
    "device-side assert": 710,
    "hardware stack error": 714,
    "illegal instruction": 715,
    "misaligned address": 716,
    "different address space": 717,
    "invalid program counter": 718,
    "unspecified launch failure": 719,
    "unknown error": 999,
}


def named(error: RuntimeError, memory: Callable[[], tuple[int, int]] | None = None) -> DeviceError | None:
    """What to raise instead of an error of PyTorch's; None if it is not about a device.

    Args:
        error: as caught.
        memory: asks for ``(free, total)`` bytes of the device.
    """
    text = str(error)
    first = text.partition("\n")[0]
    code = None
    if isinstance(error, torch.OutOfMemoryError):
        code = OUT_OF_MEMORY
    elif any(word in text for word in ("CUDA error", "CUDA driver error", "CUBLAS_STATUS_ALLOC", "initialize CUDA")):
        number = getattr(error, "error_code", None)  # AcceleratorError
        known = next((at for sentence, at in _SENTENCES.items() if sentence in first), None)
        code = number if isinstance(number, int) and number > 0 else known
        if code is None:
            return DeviceError(first)
    if code is None:
        return None
    return failure(code, first, doing="go on with PyTorch on the device", memory=memory)


class translated:  # noqa: N801  # used as a function: ``with translated():``
    """While it is entered, errors that PyTorch raises about a device leave as ours; others leave as they are.

    Args:
        memory: asks for ``(free, total)`` bytes of the device, to say them where there was too little.

    Raises:
        DeviceLostError: the device stopped answering, or a kernel before failed.
        DeviceMemoryError: it has too little memory.
        DeviceError: another of its errors.
    """

    __slots__ = ("_memory",)

    def __init__(self, memory: Callable[[], tuple[int, int]] | None = None) -> None:
        self._memory = memory

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, RuntimeError) and (ours := named(error, self._memory)) is not None:
            raise ours from error


class CudaEvent:
    """See ``interface.Event``."""

    __slots__ = ("event",)

    def __init__(self, event: Any) -> None:
        self.event = event

    def done(self) -> bool:
        """See ``Event``."""
        with translated():
            return bool(self.event.query())

    def wait(self) -> None:
        """See ``Event``."""
        with translated():
            self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        """See ``Event``."""
        with translated():
            return float(cast(CudaEvent, earlier).event.elapsed_time(self.event)) / 1e3


class CudaStream:
    """See ``interface.Stream``. Two of the same queue are equal.

    Args:
        stream: PyTorch's.
    """

    __slots__ = ("__weakref__", "stream")

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    @property
    def handle(self) -> int:
        """The driver's; 0 for the default stream."""
        return int(self.stream.cuda_stream)

    def record(self, *, timed: bool = False) -> CudaEvent:
        """See ``Stream``."""
        with translated():
            # Blocking: a thread that waits sleeps, where it would otherwise take a core from those that compute.
            event = torch.cuda.Event(enable_timing=timed, blocking=True)
            event.record(self.stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        """See ``Stream``."""
        with translated():
            self.stream.wait_event(cast(CudaEvent, event).event)

    def synchronize(self) -> None:
        """See ``Stream``."""
        with translated():
            self.stream.synchronize()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CudaStream) and self.stream == other.stream

    def __hash__(self) -> int:
        return hash(self.handle)


class CudaDevice:
    """See ``interface.Device``.

    Args:
        index: of the device among the visible ones.
        unified: whether pinned host memory is used in place; None: if the GPU is integrated. True on a discrete one
            works over the bus, slowly.
        driver: of that device; None: opened.

    Attributes:
        index: as given.
        driver: its driver.

    Raises:
        NoDeviceError: no such device, no driver, torch without CUDA, or no bindings; the message says which.
        DriverTooOldError: no virtual memory management, or a driver from before CUDA 11.
    """

    def __init__(self, index: int = 0, *, unified: bool | None = None, driver: Driver | None = None) -> None:
        check_fork()
        with translated():
            if not torch.cuda.is_available():
                raise NoDeviceError(f"there is no CUDA device: {cuda_support().reason}")
            count = torch.cuda.device_count()
            if not 0 <= index < count:
                raise NoDeviceError(f"there is no cuda:{index}: torch finds {count} (CUDA_VISIBLE_DEVICES)")
            torch.cuda.init()
            name = torch.cuda.get_device_name(index)
        self.index = index
        self.driver = driver or Driver(index)
        abilities = self.driver.abilities
        self.name = f"cuda:{index} ({name})"
        self.torch_device = torch.device("cuda", index)
        self.unified = abilities.integrated if unified is None else unified
        if self.unified and not abilities.maps_host:
            raise UsageError(f"{self.name} cannot use host memory in place: leave unified out")
        try:
            self.granularity = self.driver.granularity()
        except DriverTooOldError:
            if not self.unified:
                raise
            self.granularity = 2 << 20  # nothing is mapped where host and device share one memory
        self.workspace = _WORKSPACE
        # Without a lock: one step at a time of these is safe, and finalizers come in the middle of anything.
        self._pinned: dict[int, torch.Tensor] = {}
        self._closings: deque[Callable[[], None]] = deque()

    # -- memory ------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """See ``Device``."""
        self._tidy()
        return self.driver.memory()

    def reserve(self, nbytes: int) -> int:
        """See ``Device``."""
        return self.driver.reserve(nbytes)

    def unreserve(self, address: int, nbytes: int) -> None:
        """See ``Device``."""
        self._quietly(self.driver.unreserve, address, nbytes)

    def map(self, address: int, nbytes: int) -> object:
        """See ``Device``."""
        self._tidy()
        return self.driver.map(address, nbytes)

    def unmap(self, address: int, nbytes: int, handle: object) -> None:
        """See ``Device``."""
        self._quietly(self.driver.unmap, address, nbytes, handle)

    def _quietly(self, give_back: Callable[..., None], *arguments: Any) -> None:
        # What a lost device held is lost with it: whoever tidies up need not hear of it again.
        with contextlib.suppress(DeviceLostError):
            give_back(*arguments)

    def reclaim(self, close: Callable[[], None]) -> None:
        """See ``Device``. At once, except while the thread captures a graph: waiting for the device would end that."""
        self._closings.append(close)
        self._tidy()

    def _tidy(self) -> None:
        while self._closings and not _capturing():
            with contextlib.suppress(Exception):  # there is nobody to hear of it
                self._closings.popleft()()

    # -- pinned memory -----------------------------------------------------------------------------

    def pin(self, slab: Slab) -> None:
        """See ``Device``. What is pinned is held in full, and must not be released in part."""
        # Addresses that are pinned must not become somebody else's, even if the slab is closed without ``unpin``.
        keeper = Slab.tensor(slab, 0, torch.uint8, (slab.nbytes,))
        self.driver.register(slab.address, slab.nbytes)
        self._pinned[slab.address] = keeper

    def unpin(self, slab: Slab) -> None:
        """See ``Device``. Idempotent."""
        if self._pinned.pop(slab.address, None) is not None:
            self._quietly(self.driver.unregister, slab.address)

    def in_place(self, slab: Slab) -> int:
        """See ``Device``."""
        return self.driver.device_address(slab.address)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned."""
        return sum(keeper.nbytes for keeper in list(self._pinned.values()))

    # -- streams -----------------------------------------------------------------------------------

    def compute(self) -> CudaStream:
        """See ``Device``."""
        with translated():
            return CudaStream(torch.cuda.current_stream(self.index))

    def stream(self, name: str) -> CudaStream:
        """See ``Device``.

        Not one of PyTorch's: it hands out the same 32 in turn, and copies on a stream that somebody else captures a
        graph on would become part of the graph.
        """
        handle = self.driver.create_stream()
        with translated():
            made = CudaStream(torch.cuda.ExternalStream(handle, device=self.torch_device))
        weakref.finalize(made, _destroy, self.driver, handle).atexit = False
        return made

    def synchronize(self) -> None:
        """See ``Device``."""
        with translated():
            torch.cuda.synchronize(self.index)

    # -- copies ------------------------------------------------------------------------------------

    def copy_in(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See ``Device``."""
        if nbytes:
            self.driver.copy_in(target, source, nbytes, cast(CudaStream, stream).handle)

    def copy_out(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See ``Device``."""
        if nbytes:
            self.driver.copy_out(target, source, nbytes, cast(CudaStream, stream).handle)

    def copy_within(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """See ``Device``."""
        if nbytes:
            self.driver.copy_within(target, source, nbytes, cast(CudaStream, stream).handle)

    # -- tensors, and proofs -----------------------------------------------------------------------

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], owner: object) -> torch.Tensor:
        """See ``Device``."""
        with translated():
            return tensor_at(address, dtype, shape, self.torch_device, owner)

    def kernel_reads(self, address: int, nbytes: int) -> None:
        """See ``Device``."""

    def host_writes(self, address: int, nbytes: int) -> None:
        """See ``Device``."""

    def hand_over(self) -> object:
        """See ``Device``."""
        return None

    def take_over(self, token: object) -> None:
        """See ``Device``."""

    def __repr__(self) -> str:
        return f"<{self.name}>"


def _capturing() -> bool:
    try:
        return bool(torch.cuda.is_current_stream_capturing())
    except RuntimeError:  # of a device that is lost, or in a forked child
        return False


def _destroy(driver: Driver, handle: int) -> None:
    with contextlib.suppress(DeviceError):  # there is nobody to hear of it
        driver.destroy_stream(handle)
