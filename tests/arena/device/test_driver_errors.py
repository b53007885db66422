"""Results of the driver and errors of PyTorch, as errors with names and advice."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from narrowboat.arena.device import driver as driver_module
from narrowboat.arena.device.cuda import CudaDevice, named, translated
from narrowboat.arena.device.driver import Driver, bindings, check, kind_of, version_name
from narrowboat.errors import (
    DeviceError,
    DeviceLostError,
    DeviceMemoryError,
    DriverTooOldError,
    NoDeviceError,
    PinnedMemoryError,
)

KNOWN = {
    "CUDA_ERROR_OUT_OF_MEMORY": DeviceMemoryError,
    "CUDA_ERROR_NO_DEVICE": NoDeviceError,
    "CUDA_ERROR_INVALID_DEVICE": NoDeviceError,
    "CUDA_ERROR_DEVICE_UNAVAILABLE": NoDeviceError,
    "CUDA_ERROR_STUB_LIBRARY": NoDeviceError,
    "CUDA_ERROR_NOT_INITIALIZED": NoDeviceError,
    "CUDA_ERROR_SYSTEM_NOT_READY": NoDeviceError,
    "CUDA_ERROR_NOT_SUPPORTED": DriverTooOldError,
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": DriverTooOldError,
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": DriverTooOldError,
    "CUDA_ERROR_DEINITIALIZED": DeviceLostError,
    "CUDA_ERROR_INVALID_CONTEXT": DeviceLostError,
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": DeviceLostError,
    "CUDA_ERROR_ECC_UNCORRECTABLE": DeviceLostError,
    "CUDA_ERROR_NVLINK_UNCORRECTABLE": DeviceLostError,
    "CUDA_ERROR_ILLEGAL_ADDRESS": DeviceLostError,
    "CUDA_ERROR_LAUNCH_FAILED": DeviceLostError,
    "CUDA_ERROR_LAUNCH_TIMEOUT": DeviceLostError,
    "CUDA_ERROR_ASSERT": DeviceLostError,
    "CUDA_ERROR_UNKNOWN": DeviceLostError,
    "CUDA_ERROR_INVALID_VALUE": DeviceError,
    "CUDA_ERROR_NOT_PERMITTED": DeviceError,
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": DeviceError,
}


@pytest.fixture
def results() -> Any:
    return pytest.importorskip("cuda.bindings.driver").CUresult


def test_success_gives_what_there_is(results: Any) -> None:
    ok = results.CUDA_SUCCESS
    assert check((ok,), doing="x") is None
    assert check((ok, 5), doing="x") == 5
    assert check((ok, 5, 6), doing="x") == (5, 6)
    assert check(ok, doing="x") is None


@pytest.mark.parametrize(("name", "kind"), KNOWN.items())
def test_each_result_has_its_error(results: Any, name: str, kind: type[DeviceError]) -> None:
    result = getattr(results, name)
    with pytest.raises(kind, match=f"^cannot do it: {name} \\({int(result)}\\)") as raised:
        check((result, None), doing="do it")
    assert type(raised.value) is kind
    if kind is not DeviceError:
        assert "; " in str(raised.value)  # what to do


def test_every_result_of_the_driver_is_an_error_of_ours(results: Any) -> None:
    for result in results:
        if int(result):
            with pytest.raises(DeviceError, match=result.name):
                check((result,), doing="do it")


def test_whatever_is_documented_to_end_the_process_is_a_lost_device(results: Any) -> None:
    ending = [r for r in results if "must be terminated and relaunched" in " ".join((r.__doc__ or "").split())]
    assert [r.name for r in ending if kind_of(int(r)) is not DeviceLostError] == []


def test_too_little_memory_says_how_much_there_is(results: Any) -> None:
    with pytest.raises(DeviceMemoryError, match=r"1\.00 MiB of 8\.00 MiB are free; lower the budget"):
        check((results.CUDA_ERROR_OUT_OF_MEMORY,), doing="map", memory=lambda: (1 << 20, 8 << 20))


def test_too_little_memory_is_said_even_if_the_driver_does_not_say_how_much(results: Any) -> None:
    def lost() -> tuple[int, int]:
        raise DeviceLostError("gone")

    with pytest.raises(DeviceMemoryError):
        check((results.CUDA_ERROR_OUT_OF_MEMORY,), doing="map", memory=lost)


@pytest.mark.parametrize("name", ["OUT_OF_MEMORY", "NOT_PERMITTED", "NOT_SUPPORTED", "HOST_MEMORY_ALREADY_REGISTERED"])
def test_host_memory_that_cannot_be_pinned(results: Any, name: str) -> None:
    with pytest.raises(PinnedMemoryError, match=r"budget for cpu.*ulimit -l"):
        check((getattr(results, f"CUDA_ERROR_{name}"),), doing="pin", pinned=True)
    with pytest.raises(DeviceLostError):
        check((results.CUDA_ERROR_ILLEGAL_ADDRESS,), doing="pin", pinned=True)


def test_versions_have_names() -> None:
    assert [version_name(v) for v in (10020, 12040, 13000)] == ["10.2", "12.4", "13.0"]


# -- what is not there -----------------------------------------------------------------------------


class Broken:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            raise self._error

        return call


def test_without_the_bindings_it_is_said_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(NoDeviceError, match=r"pip install 'narrowboat\[cuda\]'"):
        bindings()


def test_no_library_and_no_function() -> None:
    with pytest.raises(NoDeviceError, match="can only be found via system search"):
        Driver(0, Broken(RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search.')))
    with pytest.raises(DriverTooOldError, match="update the NVIDIA driver"):
        Driver(0, Broken(RuntimeError('Function "cuInit" not found')))
    with pytest.raises(NoDeviceError, match="have no cuInit: pip install -U"):
        Driver(0, SimpleNamespace())
    with pytest.raises(DeviceError, match="12345"):
        Driver(0, Broken(ValueError("12345 is not a valid CUresult")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_the_real_bindings_say_so() -> None:
    pytest.importorskip("cuda.bindings.driver")
    with pytest.raises(NoDeviceError, match="cannot start the CUDA driver"):
        Driver(0)


def test_an_old_driver_is_refused(fake: SimpleNamespace) -> None:
    fake.module.version = 10020
    with pytest.raises(DriverTooOldError, match=r"CUDA 10\.2, and 11\.0 is needed"):
        Driver(0, fake.module)


def test_a_device_without_virtual_memory_is_refused_unless_it_shares_the_hosts(fake: SimpleNamespace) -> None:
    fake.module.attributes[102] = 0
    with pytest.raises(DriverTooOldError, match="no virtual memory management"):
        CudaDevice(driver=Driver(0, fake.module))
    fake.module.attributes[18] = 1
    board = CudaDevice(driver=Driver(0, fake.module))
    assert board.unified
    with pytest.raises(DriverTooOldError, match="no virtual memory management"):
        board.reserve(1 << 21)


def test_a_number_that_no_device_has(fake: SimpleNamespace) -> None:
    with pytest.raises(NoDeviceError, match="cuda:1"):
        Driver(1, fake.module)
    with pytest.raises(NoDeviceError, match="torch finds 1"):
        CudaDevice(1, driver=fake.device.driver)


# -- PyTorch's errors ------------------------------------------------------------------------------


class NumberedError(RuntimeError):
    def __init__(self, message: str, error_code: int) -> None:
        super().__init__(message)
        self.error_code = error_code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), DeviceMemoryError),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), DeviceMemoryError),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            DeviceMemoryError,
        ),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nFor debugging"), DeviceLostError),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceLostError),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceLostError),
        (RuntimeError("CUDA error: misaligned address"), DeviceLostError),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), DeviceLostError),
        (RuntimeError("CUDA driver error: driver shutting down"), DeviceLostError),
        (RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA with"), NoDeviceError),
        (NumberedError("CUDA error: words of a later version", 700), DeviceLostError),
        (NumberedError("CUDA error: words of a later version", 2), DeviceMemoryError),
        (RuntimeError("CUDA error: invalid argument"), DeviceError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), DeviceError),
    ],
)
def test_errors_of_pytorch_are_translated(error: RuntimeError, kind: type[DeviceError]) -> None:
    with pytest.raises(kind) as raised, translated(lambda: (1 << 20, 8 << 20)):
        raise error
    assert type(raised.value) is kind
    assert raised.value.__cause__ is error
    assert ("1.00 MiB of 8.00 MiB are free" in str(raised.value)) == (kind is DeviceMemoryError)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("CUDA error: x"), KeyError("x")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, translated():
        raise error
    assert raised.value is error
    if isinstance(error, RuntimeError):
        assert named(error) is None


def test_a_lost_device_shows_in_events_and_streams(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    stream = fake.device.compute()
    event = stream.record()
    for method in ("query", "synchronize", "elapsed_time"):
        monkeypatch.setattr(type(event.event), method, lost)
    for method in ("wait_event", "synchronize"):
        monkeypatch.setattr(type(stream.stream), method, lost)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(torch.cuda, "Event", lost)
    for use in (
        event.done,
        event.wait,
        lambda: event.seconds_since(event),
        lambda: stream.wait(event),
        stream.synchronize,
        stream.record,
        fake.device.synchronize,
    ):
        with pytest.raises(DeviceLostError, match="start it anew"):
            use()


# -- forks, imports --------------------------------------------------------------------------------


def test_a_forked_child_is_told_so(fake: SimpleNamespace) -> None:
    address = fake.device.reserve(2 << 20)
    child = os.fork()
    if child == 0:  # no assertions here: the child must leave without pytest's help
        right = 0
        for use in (
            fake.device.memory,
            lambda: fake.device.map(address, 2 << 20),
            lambda: fake.device.copy_in(address, address, 1, fake.device.compute()),
            lambda: Driver(0, fake.module),
            CudaDevice,
        ):
            try:
                use()
            except NoDeviceError as error:
                right += "spawn" in str(error)
        os._exit(right)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    assert not driver_module._forked


def test_importing_starts_nothing() -> None:
    names = [
        f"narrowboat.arena.device.{name}" for name in ("cuda", "driver", "find", "gds", "mirror", "emulated", "slab")
    ]
    for name in names:
        importlib.import_module(name)
    code = (
        "import os, sys, torch\n"
        "before = {m for m in sys.modules if m.startswith('cuda')}  # PyTorch looks for the bindings, too\n"
        f"import narrowboat, {', '.join(names)}, narrowboat.machine.doctor\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert {m for m in sys.modules if m.startswith('cuda')} == before\n"
        "opened = [os.readlink(f.path) for f in os.scandir('/proc/self/fd') if os.path.islink(f.path)]\n"
        "assert not any('/dev/nvidia' in path for path in [*opened, open('/proc/self/maps').read()])\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
