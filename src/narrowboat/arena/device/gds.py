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
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.errors import DeviceError, StorageError, UsageError
from narrowboat.quantities import format_bytes

ALIGNMENT = 4096
_PROBE = 2 * ALIGNMENT
_KERNEL_MODULE = Path("/proc/driver/nvidia-fs")


def probe(path: str | os.PathLike[str], device: Device) -> str:
    """Why a file cannot be read straight into the device's memory; empty if it can.

    Reads the first 8 KiB both ways and compares them: to where two chunks of memory meet, as registering such a range
    is what a driver may refuse.
    """
    if device.torch_device.type != "cuda":
        return f"{device.name} is not a CUDA device"
    if device.unified:
        return f"{device.name} shares the host's memory: reads into that are direct already"
    if not _KERNEL_MODULE.exists():
        return "the kernel module nvidia-fs is not loaded, so cuFile would read through host memory"
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        return f"{path} cannot be opened for direct reads: {error.strerror}"
    with open(path, "rb") as file:
        expected = file.read(_PROBE)
    if len(expected) < _PROBE:
        return f"{path} has less than {_PROBE} bytes"
    try:
        slab = DeviceSlab(device, 2 * device.granularity, chunk=device.granularity, populate=True)
        try:
            at = device.granularity - _PROBE // 2
            GdsReader(path, device).read(0, slab.address + at, _PROBE)
            found = bytes(slab.bytes_at(at, _PROBE))
        finally:
            slab.close()
    except (StorageError, DeviceError) as error:
        return str(error)
    return "" if found == expected else f"{path}: a direct read gave other bytes than the file has"


class GdsReader:
    """One file. The host waits for each read; kernels given afterwards see the bytes.

    PyTorch does not tell how many bytes came: whoever has to be sure compares digests, as of any other read.

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
        from torch.cuda import gds

        storage: Any = self._device.tensor(address, torch.uint8, (nbytes,), self).untyped_storage()
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
