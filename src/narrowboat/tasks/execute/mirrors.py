"""Weights of a device in pinned host memory: read from storage once, copied in whenever a block is wanted.

Weights do not change, so that nothing is ever copied back (RT-Swap's pinned buffer, without its way out). What the
host has no room for is read from storage each time; the longest loads are kept first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence

from narrowboat.arena.device.interface import Device
from narrowboat.arena.device.pinned import pinned_slab
from narrowboat.arena.slab import PAGE, Slab
from narrowboat.errors import BudgetError
from narrowboat.quantities import format_bytes

Sizes = Mapping[str, Sequence[int]]  # of every network, bytes of its units


def choose_mirrored(sizes: Sizes, room: int, beside: int) -> dict[str, list[int]]:
    """Which units are kept in host memory: all of them, or the largest, as long as they fit.

    Args:
        sizes: of units, by network.
        room: bytes of pinned memory.
        beside: bytes of it that reading the others takes.

    Raises:
        BudgetError: there is room neither for all nor for that.
    """
    total = sum(sum(units) for units in sizes.values())
    if total <= room:
        return {name: [k for k, n in enumerate(units) if n] for name, units in sizes.items()}
    left = room - beside
    if left < 0:
        raise BudgetError(
            f"host_budget {format_bytes(room)} holds neither all weights ({format_bytes(total)}) nor the buffers "
            f"through which they would be read: the smallest that does is {format_bytes(beside)} ({beside} bytes)",
            minimum=min(beside, total),
            limiter="staging buffers",
        )
    chosen: dict[str, list[int]] = {name: [] for name in sizes}
    ordered = sorted((-n, name, k) for name, units in sizes.items() for k, n in enumerate(units) if n)
    for negative, name, k in ordered:
        if -negative <= left:
            left += negative
            chosen[name].append(k)
    return {name: sorted(units) for name, units in chosen.items()}


class Mirror:
    """Units of one network in pinned memory.

    Args:
        device: copies from it.
        sizes: bytes of every unit.
        units: which are kept here, in order; all of them lie at the offsets they have when they are packed.

    Attributes:
        offsets: of the units that are here, by number.
        slab: the memory.
        known: what the thread that filled it knew then.

    Raises:
        PinnedMemoryError: the system refuses to pin it.
        StorageError: it has no such memory.
    """

    def __init__(self, device: Device, sizes: Sequence[int], units: Collection[int]) -> None:
        self._device = device
        self.offsets: dict[int, int] = {}
        at = 0
        for unit in sorted(units):
            self.offsets[unit] = at
            at += -(-sizes[unit] // PAGE) * PAGE
        self.known: object = None
        self.slab: Slab | None = pinned_slab(device, at) if at else None

    @property
    def nbytes(self) -> int:
        """Pinned."""
        return self.slab.nbytes if self.slab is not None else 0

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # or the memory would go while the device still has it pinned
            self.close()

    def close(self) -> None:
        """Give the memory back; every copy from it is over. Idempotent."""
        if self.slab is not None:
            self._device.unpin(self.slab)
            self.slab.close()
            self.slab, self.offsets = None, {}
