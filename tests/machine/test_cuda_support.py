"""What is said of CUDA where there is none, where there is a driver, and where something is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from narrowboat.machine import cuda
from narrowboat.machine.cuda import CudaDevice, cuda_support


class Library:
    """What is used of libcuda."""

    def __init__(self, version: int = 12040, attributes: dict[int, int] | None = None, result: int = 0) -> None:
        self._version, self._attributes, self._result = version, attributes or {}, result

    def cuDriverGetVersion(self, value: Any) -> int:  # noqa: N802
        value._obj.value = self._version
        return self._result

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._result

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, device: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = self._attributes.get(number, 0)
        return 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (5, 8))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Card")
    monkeypatch.setattr(cuda, "_library", lambda: Library(attributes={102: 1}))
    return monkeypatch


def test_a_gpu_with_all_that_is_needed(gpu: Any) -> None:
    found = cuda_support()
    assert found.devices == (CudaDevice("Card", 8, 5, True, False),)
    assert (found.reason, found.driver) == ("", "12.4")
    assert bool(found.bindings) == (importlib.util.find_spec("cuda.bindings") is not None)


@pytest.mark.parametrize(
    ("library", "driver", "able", "integrated"),
    [
        (Library(13000, {102: 1, 18: 1}), "13.0", True, True),
        (Library(11080), "11.8", False, False),
        (Library(result=999), "", None, None),
        (None, "", None, None),
    ],
)
def test_what_the_driver_says(gpu: Any, library: Any, driver: str, able: bool | None, integrated: bool | None) -> None:
    gpu.setattr(cuda, "_library", lambda: library)
    found = cuda_support()
    assert (found.driver, found.devices[0].virtual_memory, found.devices[0].integrated) == (driver, able, integrated)


def test_a_device_that_does_not_answer(gpu: Any) -> None:
    def lost(index: int) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    gpu.setattr(torch.cuda, "mem_get_info", lost)
    assert cuda_support().reason == "CUDA device 0 does not answer: CUDA error: unspecified launch failure"


def test_no_driver_and_no_device(gpu: Any) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "finds no device (the driver supports CUDA 12.4)" in cuda_support().reason
    gpu.setattr(cuda, "_library", lambda: None)
    assert "finds no driver" in cuda_support().reason


def test_a_forked_child_is_told_so(gpu: Any) -> None:
    gpu.setattr(torch.cuda, "_is_in_bad_fork", lambda: True, raising=False)
    assert "forked" in cuda_support().reason


@pytest.mark.parametrize("spec", [None, ModuleNotFoundError("cuda"), ValueError("cuda.__spec__ is None")])
def test_without_the_bindings(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    def find(name: str) -> Any:
        if isinstance(spec, Exception):
            raise spec
        return spec

    monkeypatch.setattr(cuda, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=find)))
    assert cuda_support().bindings == ""


def test_asking_for_the_bindings_does_not_start_the_driver() -> None:
    code = (
        "from narrowboat.machine.cuda import _bindings\n"
        "_bindings()\n"
        "assert 'libcuda' not in open('/proc/self/maps').read()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
