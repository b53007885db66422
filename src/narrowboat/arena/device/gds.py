"""From storage straight into a GPU's memory, without host memory between: ``torch.cuda.gds``, where it really does so.

cuFile falls back silently to buffers of its own in host memory where it has no direct way. Those are no part of any
budget, so what cannot be direct is not used here. ``probe`` says why.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from narrowboat.arena.device.interface import Device
from narrowboat.errors import DeviceError, StorageError, UsageError
from narrowboat.quantities import format_bytes

ALIGNMENT = 4096
_KERNEL_MODULE = Path("/proc/driver/nvidia-fs")


def probe(path: str | os.PathLike[str], device: Device) -> str:
    """Why a file cannot be read straight into the device's memory; empty if it can.

    Reads the first 4 KiB both ways and compares them.
    """
    if device.torch_device.type != "cuda":
        return f"{device.name} is not a CUDA device"
    if device.unified:
        return f"{device.name} shares the host's memory: reads into that are direct already"
    if not _KERNEL_MODULE.exists():
        return "the kernel module nvidia-fs is not loaded, so cuFile would read through host memory"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        return f"{path} cannot be opened for direct reads: {error.strerror}"
    os.close(fd)
    if os.path.getsize(path) < ALIGNMENT:
        return f"{path} has less than {ALIGNMENT} bytes"
    try:
        reader = GdsReader(path, device)
        found = torch.zeros(ALIGNMENT, dtype=torch.uint8, device=device.torch_device)
        device.synchronize()  # the zeros are written before the read begins
        reader.load(found.untyped_storage(), 0)
    except (StorageError, DeviceError) as error:
        return str(error)
    with open(path, "rb") as file:
        if bytes(found.cpu().tolist()) != file.read(ALIGNMENT):
            return f"{path}: a direct read gave other bytes than the file has"
    return ""


class GdsReader:
    """One file. The host waits for each read; kernels given afterwards see the bytes.

    Args:
        path: of the file.
        device: which.

    Raises:
        StorageError: cuFile refuses the file.
    """

    def __init__(self, path: str | os.PathLike[str], device: Device) -> None:
        self._path, self._device = os.fspath(path), device
        try:
            from torch.cuda.gds import GdsFile

            self._file: Any = GdsFile(self._path, os.O_RDONLY)
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            raise StorageError(f"{self._path} cannot be read directly: {str(error).partition(chr(10))[0]}") from error

    def read(self, offset: int, address: int, nbytes: int) -> None:
        """Read bytes of the file to an address of the device that has memory and that nothing uses.

        Args:
            offset: in the file.
            address: of the device.
            nbytes: how many; all three are multiples of 4096, as cuFile goes through other memory otherwise.

        Raises:
            UsageError: not aligned.
            StorageError: the read failed, or the file is shorter.
        """
        if (offset | address | nbytes) % ALIGNMENT:
            raise UsageError(f"direct reads need multiples of {ALIGNMENT}, not {offset}, {address:#x}, {nbytes}")
        if offset + nbytes > -(-os.path.getsize(self._path) // ALIGNMENT) * ALIGNMENT:
            raise StorageError(f"{self._path} ends before {format_bytes(offset + nbytes)}: it is truncated")
        self.load(self._device.tensor(address, torch.uint8, (nbytes,), self).untyped_storage(), offset)

    def load(self, storage: Any, offset: int) -> None:
        """Fill a storage of the device with what the file has from ``offset`` on.

        Raises:
            StorageError: the read failed.
        """
        from torch.cuda import gds

        try:
            # Registered only for as long as the read takes: what is registered is the memory that lies behind the
            # addresses now, and not what is mapped there later.
            gds.gds_register_buffer(storage)
            try:
                self._file.load_storage(storage, offset)
            finally:
                gds.gds_deregister_buffer(storage)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise StorageError(f"{self._path} cannot be read directly at {offset}: {reason}") from error
