"""Devices to run a test on: the emulated one, a GPU where there is one, and the CUDA device over a fake driver."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from narrowboat.arena.device.cuda import CudaDevice
from narrowboat.arena.device.driver import Driver
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.find import open_device
from narrowboat.arena.slab import Slab
from narrowboat.errors import DeviceError

ON_A_GPU = pytest.param("cuda", marks=pytest.mark.cuda)
SUCCESS, OUT_OF_MEMORY, ILLEGAL_ADDRESS = 0, 2, 700


def a_gpu(**options: Any) -> Any:
    """The first GPU, or the reason why this test cannot have it."""
    try:
        return CudaDevice(0, **options) if options else open_device("cuda")
    except DeviceError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")


@pytest.fixture(params=["emulated", ON_A_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A device with memory of its own."""
    made = EmulatedDevice(64 << 20, jitter=7) if request.param == "emulated" else a_gpu()
    yield made
    made.synchronize()


@pytest.fixture(params=["emulated", ON_A_GPU])
def unified(request: pytest.FixtureRequest) -> Any:
    """A device that uses host memory in place."""
    return EmulatedDevice(64 << 20, unified=True) if request.param == "emulated" else a_gpu(unified=True)


class Kit:
    """Bytes to a device and back."""

    @staticmethod
    def pattern(nbytes: int, seed: int) -> torch.Tensor:
        return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

    @staticmethod
    def put(slab: Any, offset: int, values: torch.Tensor) -> None:
        """Write bytes there; they are there when this returns."""
        device = slab.device
        host = Slab(values.numel())
        host.tensor(0, torch.uint8, tuple(values.shape)).copy_(values)
        device.pin(host)
        stream = device.compute()
        device.copy_in(slab.address + offset, host.address, values.numel(), stream)
        stream.synchronize()
        device.unpin(host)
        host.close()

    @staticmethod
    def get(slab: Any, offset: int, nbytes: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(slab.bytes_at(offset, nbytes)), dtype=torch.uint8)


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


# -- the CUDA device without a GPU -----------------------------------------------------------------


class FakeStream:
    """What is used of ``torch.cuda.Stream``."""

    def __init__(self, log: list[str], handle: int) -> None:
        self._log, self.cuda_stream = log, handle

    def wait_event(self, event: FakeEvent) -> None:
        self._log.append(f"stream {self.cuda_stream} waits for event {event.number}")

    def synchronize(self) -> None:
        self._log.append(f"host waits for stream {self.cuda_stream}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and self.cuda_stream == other.cuda_stream

    def __hash__(self) -> int:
        return self.cuda_stream


class FakeEvent:
    """What is used of ``torch.cuda.Event``."""

    made = 0

    def __init__(self, log: list[str], **options: Any) -> None:
        self._log, self.options = log, options
        FakeEvent.made += 1
        self.number = FakeEvent.made

    def record(self, stream: FakeStream) -> None:
        self._log.append(f"event {self.number} on stream {stream.cuda_stream}")

    def synchronize(self) -> None:
        self._log.append(f"host waits for event {self.number}")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: FakeEvent) -> float:
        return 250.0


class FakeModule:
    """``cuda.bindings.driver`` with its own types, and functions that write down how they were called.

    Args:
        real: the module.
        log: where to.

    Attributes:
        failing: the results to give instead of success, by ``(function, its how-many-eth call)``.
    """

    def __init__(self, real: Any, log: list[str]) -> None:
        self._real, self._log = real, log
        self.failing: dict[tuple[str, int], int] = {}
        self.attributes = {102: 1, 19: 1, 110: 1}
        self.version, self.total, self.used = 13000, 64 << 20, 0
        self.current = [0]
        self._calls: dict[str, int] = {}
        self._handles = 0
        self._sizes: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or name.startswith("cuda"):
            return getattr(self._real, name)

        def call(*arguments: Any) -> Any:
            self._calls[name] = self._calls.get(name, 0) + 1
            code = self.failing.get((name, self._calls[name]), 0)
            if not name.startswith(("cuCtx", "cuDevice", "cuInit", "cuDriver", "cuMemGetInfo")):
                told = ", ".join(self._tell(argument) for argument in arguments)
                self._log.append(f"{name}({told})" + (f" fails with {code}" if code else ""))
            values = () if code else self._answer(name, arguments)
            return (self._real.CUresult(code), *(values or (() if not code else (None,))))

        return call

    def _tell(self, argument: Any) -> str:
        known = {"CUmemAllocationProp": "prop", "CUmemAllocationGranularity_flags": "minimum"}
        if isinstance(argument, list):
            return f"[{', '.join(type(each).__name__ for each in argument)}]"
        name = type(argument).__name__
        return known[name] if name in known else str(int(argument))

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        simple: dict[str, Any] = {
            "cuDriverGetVersion": self.version,
            "cuDeviceGetCount": 1,
            "cuDeviceGet": 0,
            "cuDevicePrimaryCtxRetain": 77,
            "cuMemGetAllocationGranularity": 2 << 20,
            "cuMemAddressReserve": 1 << 40,
            "cuStreamCreate": 5000,
        }
        if name in simple:
            return (simple[name],)
        if name == "cuDeviceGetAttribute":
            return (self.attributes.get(int(arguments[0]), 0),)
        if name == "cuCtxGetCurrent":
            return (self.current[-1],)
        if name == "cuCtxPushCurrent":
            self.current.append(int(arguments[0]))
        if name == "cuCtxPopCurrent":
            return (self.current.pop(),)
        if name == "cuMemGetInfo":
            return self.total - self.used, self.total
        if name == "cuMemHostGetDevicePointer":
            return (arguments[0],)
        if name == "cuMemCreate":
            self._handles += 1
            self._sizes[self._handles] = arguments[0]
            self.used += arguments[0]
            return (self._handles,)
        if name == "cuMemRelease":
            self.used -= self._sizes.pop(int(arguments[0]))
        return ()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A ``CudaDevice`` over a fake driver and a fake ``torch.cuda``, and what they were asked, in order."""
    real = pytest.importorskip("cuda.bindings.driver")
    log: list[str] = []
    FakeEvent.made = 0
    current = FakeStream(log, 0)
    for name, stand_in in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "init": lambda: None,
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: made.capturing,
        "get_device_name": lambda index: "Fake",
        "current_stream": lambda index: current,
        "ExternalStream": lambda handle, device: FakeStream(log, handle),
        "Event": lambda **options: FakeEvent(log, **options),
        "synchronize": lambda index: log.append("host waits for the device"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    module = FakeModule(real, log)
    made = SimpleNamespace(module=module, log=log, device=None, capturing=False)
    made.device = CudaDevice(driver=Driver(0, module))
    log.clear()
    yield made
    gc.collect()
    assert module.current == [0], "a thread was left with another current context"
