"""Host memory that a device copies from and to on its own."""

from __future__ import annotations

from narrowboat.arena.device.interface import Device
from narrowboat.arena.slab import Slab


def pinned_slab(device: Device, nbytes: int) -> Slab:
    """A slab that is pinned; its owner gives it to ``device.unpin`` before closing it.

    Args:
        nbytes: size; rounded up to a page.

    Raises:
        PinnedMemoryError: the system refuses to pin it; it is given back.
        StorageError: the system has no such memory.
    """
    slab = Slab(nbytes)
    try:
        device.pin(slab)
    except BaseException:
        slab.close()
        raise
    return slab
