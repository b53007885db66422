"""Reads straight from storage into a GPU: why there are none, and how they are made."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat.arena.device import gds
from narrowboat.arena.device.dlpack import tensor_at
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.errors import DeviceError, StorageError, UsageError


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 64)
    return path


class FakeDevice:
    """A device of whose tensors nothing is known but their bytes."""

    name, unified, torch_device = "cuda:0 (Fake)", False, torch.device("cuda", 0)

    def __init__(self) -> None:
        self.memory = torch.zeros(16384, dtype=torch.uint8)

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], owner: object) -> torch.Tensor:
        return self.memory[address : address + shape[0]].clone()


@pytest.fixture
def cufile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """PyTorch's module where it works, and what it was asked."""
    import torch.cuda.gds as real

    log: list[Any] = []

    class GdsFile:
        def __init__(self, path: str, flags: int) -> None:
            log.append(("open", flags))

        def load_storage(self, storage: Any, offset: int) -> None:
            log.append(("load", storage.nbytes(), offset))
            if offset == 8192:
                raise RuntimeError("cuFileRead failed: GPUDirect Storage not supported\nin a file")

    monkeypatch.setattr(real, "GdsFile", GdsFile)
    monkeypatch.setattr(real, "gds_register_buffer", lambda storage: log.append("register"))
    monkeypatch.setattr(real, "gds_deregister_buffer", lambda storage: log.append("deregister"))
    return log


def test_a_device_that_is_none_of_nvidias(weights: Path) -> None:
    assert gds.probe(weights, EmulatedDevice()) == "emulated is not a CUDA device"


def test_why_a_file_cannot_be_read_directly(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device: Any = FakeDevice()
    monkeypatch.setattr(gds, "_KERNEL_MODULE", tmp_path / "nowhere")
    assert "nvidia-fs is not loaded" in gds.probe(weights, device)
    monkeypatch.setattr(gds, "_KERNEL_MODULE", tmp_path)
    assert "cannot be opened for direct reads: No such file" in gds.probe(tmp_path / "missing", device)
    weights.write_bytes(b"short")
    reason = gds.probe(weights, device)
    assert "less than 8192 bytes" in reason or "cannot be opened for direct reads" in reason
    device.unified = True
    assert "shares the host's memory" in gds.probe(weights, device)


class Gpu(EmulatedDevice):
    """Emulated, and says that it is none."""

    def __init__(self) -> None:
        super().__init__()
        self.torch_device = torch.device("cuda", 0)

    def tensor(self, address: int, dtype: torch.dtype, shape: tuple[int, ...], owner: object) -> torch.Tensor:
        return tensor_at(address, dtype, shape, torch.device("cpu"), owner)


@pytest.mark.parametrize(
    ("wrong", "reason"), [(0, ""), (1, "other bytes than the file has"), (2, "cuFileRead failed")]
)
def test_a_probe_reads_across_two_chunks_and_compares(
    weights: Path, cufile: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wrong: int, reason: str
) -> None:
    import torch.cuda.gds as real

    def load(self: Any, storage: Any, offset: int) -> None:
        if wrong == 2:
            raise RuntimeError("cuFileRead failed: x")
        data = bytearray(weights.read_bytes()[offset : offset + storage.nbytes()])
        data[-1] ^= wrong
        ctypes.memmove(storage.data_ptr(), bytes(data), len(data))

    monkeypatch.setattr(gds, "_KERNEL_MODULE", tmp_path)
    monkeypatch.setattr(real.GdsFile, "load_storage", load)
    device = Gpu()
    before = device.memory()
    found = gds.probe(weights, device)
    if "cannot be opened for direct reads" in found:
        pytest.skip(found)
    assert (reason in found) if reason else found == ""
    assert cufile[1:] == ["register", "deregister"]
    assert device.memory() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_pytorch_without_it(weights: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot be read directly: .*not supported on this platform"):
        gds.GdsReader(weights, FakeDevice())  # type: ignore[arg-type]


def test_a_read_registers_its_memory_for_as_long_as_it_takes(weights: Path, cufile: list[Any]) -> None:
    reader = gds.GdsReader(weights, FakeDevice())  # type: ignore[arg-type]
    reader.read(4096, 4096, 8192)
    assert cufile == [("open", os.O_RDONLY), "register", ("load", 8192, 4096), "deregister"]
    cufile.clear()
    with pytest.raises(StorageError, match=r"at 8192: cuFileRead failed: GPUDirect Storage not supported$"):
        reader.read(8192, 0, 4096)
    assert cufile == ["register", ("load", 4096, 8192), "deregister"]


def test_what_is_not_aligned_or_not_there_is_refused(weights: Path, cufile: list[Any]) -> None:
    reader = gds.GdsReader(weights, FakeDevice())  # type: ignore[arg-type]
    for wrong in ((1, 0, 4096), (0, 1, 4096), (0, 0, 100)):
        with pytest.raises(UsageError, match="multiples of 4096"):
            reader.read(*wrong)
    with pytest.raises(StorageError, match="truncated"):
        reader.read(16384, 0, 4096)
    assert cufile == [("open", os.O_RDONLY)]


@pytest.mark.cuda
def test_on_a_gpu_it_works_or_says_why_not(weights: Path) -> None:
    try:
        device = open_device("cuda")
    except DeviceError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    reason = gds.probe(weights, device)
    if reason:
        pytest.skip(reason)
    slab = DeviceSlab(device, device.granularity, populate=True)
    gds.GdsReader(weights, device).read(4096, slab.address + 8192, 4096)
    assert bytes(slab.bytes_at(8192, 4096)) == weights.read_bytes()[4096:8192]
    slab.close()


def test_the_fake_is_like_the_real_one() -> None:
    from torch.cuda.gds import GdsFile

    assert callable(GdsFile.load_storage)
