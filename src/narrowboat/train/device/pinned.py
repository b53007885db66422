"""Pinned host memory for activations: one slab, handed out in slots."""

from __future__ import annotations

import torch

from narrowboat.arena.device.interface import Device
from narrowboat.arena.device.pinned import pinned_slab
from narrowboat.arena.slab import Slab
from narrowboat.train.spill_slots import Slots, rounded


class PinnedRoom:
    """Slots of a slab that a device copies to and from on its own. Not safe for several threads by itself.

    Pinning takes the system about as long as writing to the memory once, so a room is made as large as a plan asks for
    and stays.

    Args:
        device: for which the memory is pinned.

    Attributes:
        nbytes: pinned now.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slab: Slab | None = None
        self._slots = Slots()
        self.nbytes = 0

    @property
    def taken(self) -> int:
        """Bytes in slots."""
        return self._slots.taken

    def resize(self, nbytes: int) -> None:
        """Have so many bytes, in whole pages, pinned. No slot may be taken, and nothing under way on the device.

        Raises:
            PinnedMemoryError: refused; there is no room then.
            StorageError: the system has no such memory to give; there is no room then.
        """
        self.close()
        slab = pinned_slab(self._device, rounded(nbytes))
        self._slab, self.nbytes = slab, slab.nbytes
        self._slots.grow(slab.nbytes)

    def take(self, nbytes: int) -> int | None:
        """The offset of a slot for so many bytes (more than 0); None where no hole is that large."""
        size = rounded(nbytes)
        # A room does not grow as the spill file does.
        return None if self._slots.missing(size) else self._slots.take(size)

    def give(self, offset: int, nbytes: int) -> None:
        """Free the slot for so many bytes at ``offset``."""
        self._slots.give(offset, rounded(nbytes))

    def address(self, offset: int) -> int:
        """Of the slot at ``offset``."""
        assert self._slab is not None
        return self._slab.address + offset

    def storage(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """The slot's bytes as a storage of the CPU, by reference."""
        assert self._slab is not None
        return self._slab.tensor(offset, torch.uint8, (nbytes,)).untyped_storage()

    def close(self) -> None:
        """Unpin everything and give it back. The device must have nothing under way there."""
        slab, self._slab = self._slab, None
        self.nbytes, self._slots = 0, Slots()
        if slab is not None:
            self._device.unpin(slab)
            slab.close()
