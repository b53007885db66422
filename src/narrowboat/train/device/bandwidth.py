"""How fast a device copies to pinned host memory and back."""

from __future__ import annotations

import torch

from narrowboat.arena.device.interface import Device, Stream
from narrowboat.arena.slab import Slab

_TRIED = 32 << 20  # bytes of one copy: enough for the bus to be at full speed
_LEAST = 1 << 20
_ROUNDS = 3  # the first warms up


def measure_copies(device: Device, nbytes: int = _TRIED) -> tuple[float, float]:
    """Bytes per second from the device to pinned memory, and back to it; by the device's own clock.

    Args:
        device: with so many bytes free, or fewer: then it is measured with fewer.
        nbytes: of one copy.

    Raises:
        PinnedMemoryError: pinning is refused.
        StorageError: the host has no such memory.
        torch.OutOfMemoryError: nor has the device.
    """
    nbytes = max(min(nbytes, device.memory()[0] // 4), _LEAST)
    slab = Slab(nbytes)
    try:
        device.pin(slab)
        try:
            with torch.inference_mode(False), torch.no_grad():
                tensor = torch.zeros(nbytes, dtype=torch.uint8, device=device.torch_device)
            stream = device.stream("spill-measuring")
            stream.wait(device.compute().record())
            out, back = [], []
            for _ in range(_ROUNDS):
                out.append(_timed(stream, lambda: device.copy_out(slab.address, tensor.data_ptr(), nbytes, stream)))
                back.append(_timed(stream, lambda: device.copy_in(tensor.data_ptr(), slab.address, nbytes, stream)))
            return nbytes / min(out[1:]), nbytes / min(back[1:])
        finally:
            device.synchronize()
            device.unpin(slab)
    finally:
        slab.close()


def _timed(stream: Stream, copy: object) -> float:
    begin = stream.record(timed=True)
    assert callable(copy)
    copy()
    end = stream.record(timed=True)
    stream.synchronize()
    return max(end.seconds_since(begin), 1e-9)
