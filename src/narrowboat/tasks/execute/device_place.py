"""A device's memory as tasks use it: addresses that stay, chunks that come and go, and a pool that counts them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from narrowboat.arena.device.interface import Device
from narrowboat.arena.device.slab import DeviceSlab
from narrowboat.arena.pool import Extents
from narrowboat.errors import StorageError
from narrowboat.quantities import format_bytes
from narrowboat.tasks.execute.space import Place

Span = tuple[int, int, int]  # of one unit: its number, first byte and past the last byte, in its window


class Tally:
    """Bytes that several windows have mapped together. Thread-safe.

    Attributes:
        nbytes: now.
        most: so far.
    """

    def __init__(self) -> None:
        self.nbytes = self.most = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many more; or fewer, if negative."""
        with self._lock:
            self.nbytes += nbytes
            self.most = max(self.most, self.nbytes)

    def begin_anew(self) -> None:
        """``most`` counts from now."""
        self.most = self.nbytes


class Window(DeviceSlab):
    """The addresses of one network: every unit has its own, which stay; memory is behind those that are in.

    Args:
        device: whose memory.
        nbytes: of addresses.
        chunk: bytes that come and go together.
        tally: where what is mapped is counted.
    """

    def __init__(self, device: Device, nbytes: int, chunk: int, tally: Tally) -> None:
        super().__init__(device, nbytes, chunk=chunk, populate=False)
        self._tally = tally

    def back(self, offset: int) -> bool:
        """See ``DeviceSlab``."""
        fresh = super().back(offset)
        if fresh:
            self._tally.add(self.chunk)
        return fresh

    def unback(self, offset: int, nbytes: int) -> int:
        """See ``DeviceSlab``."""
        gone = super().unback(offset, nbytes)
        self._tally.add(-gone)
        return gone

    def close(self) -> None:
        """See ``DeviceSlab``."""
        held = self.mapped_bytes
        super().close()
        self._tally.add(-held)


@dataclass(eq=False)
class DevicePlace(Place):
    """A block's addresses: those of its units that are not pinned, one after the other.

    Attributes:
        spans: of its units; ``nbytes`` is the sum.
        out: bytes of its beginning that are not in, under policies that swap by volume.
    """

    spans: Sequence[Span] = ()
    out: int = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.nbytes

    def back(self, extents: Extents) -> None:
        """Chunks are mapped as they are loaded, so that mapping one overlaps copying the one before."""

    def unback(self) -> None:
        """See ``Place``. Whoever computed on it has waited for its kernels."""
        self.let_out(0, self.nbytes)

    def let_out(self, low: int, high: int) -> None:
        """Unmap bytes ``[low, high)`` of the block."""
        for _, begin, end in self.part(low, high):
            self.slab.unback(begin, end - begin)

    def part(self, low: int, high: int) -> list[Span]:
        """Where bytes ``[low, high)`` of the block lie."""
        found: list[Span] = []
        at = 0
        for unit, begin, end in self.spans:
            first, last = max(low - at, 0), min(high - at, end - begin)
            if first < last:
                found.append((unit, begin + first, begin + last))
            at += end - begin
        return found


class ChunkPool:
    """So many bytes of a device's memory, lent in whole chunks; only counted: what is lent is mapped when it is used.

    Args:
        nbytes: rounded down to chunks.
        chunk: bytes.
    """

    locked = True  # the device's memory is not swapped out

    def __init__(self, nbytes: int, chunk: int) -> None:
        self._chunk = chunk
        self.nbytes = max(nbytes // chunk, 0) * chunk
        self._lent = 0

    @property
    def free_bytes(self) -> int:
        """See ``Pool``."""
        return self.nbytes - self._lent

    def take(self, nbytes: int) -> Extents | None:
        """See ``Pool``."""
        if nbytes > self.free_bytes:
            return None
        self._lent += nbytes
        return [(0, nbytes)]

    def give(self, extents: Extents) -> None:
        """See ``Pool``."""
        self._lent -= sum(nbytes for _, nbytes in extents)

    def resize(self, nbytes: int) -> None:
        """See ``Pool``."""
        wanted = max(nbytes // self._chunk, 0) * self._chunk
        if wanted < self._lent:
            raise StorageError(
                f"{format_bytes(self._lent)} of the pool are in use: it cannot shrink to {format_bytes(wanted)}"
            )
        self.nbytes = wanted

    def close(self) -> None:
        """See ``Pool``."""
