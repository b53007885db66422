"""Pinned host memory that keeps blocks of a model whose place is on a device: swapped in from here, not from storage.

A cached block has its own place, laid out as on the device, so that swapping it in is one copy. It is filled when the
block is first read: from storage to its place here, and from here on, with no stop between.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from narrowboat.arena.device.interface import Device
from narrowboat.arena.device.pinned import pinned_slab
from narrowboat.arena.slab import PAGE, Slab


@dataclass(eq=False, slots=True)
class CacheSlot:
    """One block's place.

    Attributes:
        offset: of it in the cache.
        nbytes: whole pages.
        holds: what it has been given to keep: numbers of weights, and where each lies in the block. Numbers of blocks
            alone do not say, as another trace forms other blocks.
        begun: somebody has begun to fill it.
        filled: the block's bytes are there.
        known: what the thread that filled it knew then (``Device.hand_over``).
    """

    offset: int
    nbytes: int
    holds: tuple[object, ...] = ()
    begun: bool = False
    filled: bool = False
    known: object = None


class HostCache:
    """The memory, and which block lies where.

    Args:
        device: copies from it.
        nbytes: of pinned host memory.

    Raises:
        PinnedMemoryError: the system refuses to pin it.
        StorageError: it has no such memory.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device = device
        self.nbytes = nbytes // PAGE * PAGE
        self.slab: Slab | None = pinned_slab(device, self.nbytes) if self.nbytes else None
        self._slots: dict[int, CacheSlot] = {}

    @property
    def held(self) -> int:
        """Bytes of the places given out."""
        return sum(slot.nbytes for slot in self._slots.values())

    def arrange(self, sizes: Sequence[int], wanted: Collection[int]) -> None:
        """Give each wanted block a place; those that have one, and their bytes, keep it. Nothing is under way.

        Args:
            sizes: bytes of every block.
            wanted: numbers of blocks that fit together.
        """
        self._slots = {i: slot for i, slot in self._slots.items() if i in wanted and slot.nbytes == sizes[i]}
        missing = sorted(set(wanted) - self._slots.keys(), key=lambda i: -sizes[i])
        for i in missing:
            offset = self._gap(sizes[i])
            if offset is None:  # holes too small for it: begin anew
                self._slots = {}
                at = 0
                for each in sorted(wanted):
                    self._slots[each] = CacheSlot(at, sizes[each])
                    at += sizes[each]
                return
            self._slots[i] = CacheSlot(offset, sizes[i])

    def _gap(self, nbytes: int) -> int | None:
        at = 0
        for slot in sorted(self._slots.values(), key=lambda slot: slot.offset):
            if slot.offset - at >= nbytes:
                return at
            at = slot.offset + slot.nbytes
        return at if self.nbytes - at >= nbytes else None

    def slot(self, block: int) -> CacheSlot | None:
        """The place of a block; None if it is not cached."""
        return self._slots.get(block)

    def forget(self) -> None:
        """What is in it is of no more use; blocks of another model may come."""
        self._slots = {}

    def __del__(self) -> None:
        if self.__dict__.get("slab") is not None:  # or the memory would go while the device still has it pinned
            self._device.reclaim(self.close)

    def close(self) -> None:
        """Give the memory back; every copy from it is over."""
        if self.slab is not None:
            self._device.unpin(self.slab)
            self.slab.close()
            self.slab, self._slots = None, {}
