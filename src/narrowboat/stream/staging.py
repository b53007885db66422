"""Pinned host memory through which bytes pass on their way from storage to a device.

Each of the reader's threads has two buffers: one is being read into while the other is being copied from. A thread
waits for a copy only before it reads over what that copy reads; nobody else waits.
"""

from __future__ import annotations

from narrowboat.arena.device.interface import Device, Event
from narrowboat.arena.device.pinned import pinned_slab
from narrowboat.arena.slab import PAGE
from narrowboat.errors import BudgetError
from narrowboat.quantities import format_bytes

_BUFFERS = 2
_SHARE = 4  # the rest of the host's bytes keeps weights
_LEAST_CHUNK = 64 << 10


def staging_chunk(room: int, workers: int, most: int) -> int:
    """The bytes of a chunk such that all buffers fit in a quarter of ``room`` bytes; or, if need be, in all of them.

    Raises:
        BudgetError: there is no room for chunks that are worth reading.
    """
    enough = min(_LEAST_CHUNK, most)
    buffers = workers * _BUFFERS
    chunk = min(most, room // _SHARE // buffers - 2 * PAGE) // PAGE * PAGE
    if chunk < enough:
        chunk = min(enough, room // buffers - 2 * PAGE) // PAGE * PAGE
    if chunk < enough:
        least = staging_bytes(enough, workers)
        raise BudgetError(
            f"budget {format_bytes(room)} for cpu cannot hold the buffers between storage and the device: the "
            f"smallest that can is {format_bytes(least)} ({least} bytes)",
            minimum=least,
            limiter="staging buffers",
        )
    return chunk


def staging_bytes(chunk: int, workers: int) -> int:
    """Bytes of all buffers."""
    return workers * _BUFFERS * (chunk + 2 * PAGE)


class Staging:
    """The buffers.

    Args:
        device: copies from them.
        chunk: bytes that each takes, wherever in a page they begin.
        workers: the reader's threads.

    Raises:
        PinnedMemoryError: the system refuses to pin them.
        StorageError: it has no such memory.
    """

    def __init__(self, device: Device, chunk: int, workers: int) -> None:
        self._device, self._size = device, chunk + 2 * PAGE
        self.slab = pinned_slab(device, staging_bytes(chunk, workers))
        self._closed = False
        self._turn = [0] * workers
        self._copied: list[Event | None] = [None] * (workers * _BUFFERS)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.slab.nbytes

    def take(self, worker: int) -> tuple[int, int]:
        """``(number, offset in the slab)`` of a buffer that the calling thread may write to."""
        self._turn[worker] ^= 1
        number = worker * _BUFFERS + self._turn[worker]
        event = self._copied[number]
        if event is not None:
            event.wait()
            self._copied[number] = None
        offset = number * self._size
        self._device.host_writes(self.slab.address + offset, self._size)
        return number, offset

    def bytes_of(self, offset: int) -> memoryview:
        """The buffer at ``offset``."""
        return self.slab.bytes_at(offset, self._size)

    def give(self, number: int, copied: Event) -> None:
        """The buffer may be written to when that copy is done."""
        self._copied[number] = copied

    def __del__(self) -> None:
        if not self.__dict__.get("_closed", True):  # or the memory would go while the device still has it pinned
            self._device.reclaim(self.close)

    def close(self) -> None:
        """Give the memory back; every copy from it is over. Idempotent."""
        if not self._closed:
            self._closed = True
            self._device.unpin(self.slab)
            self.slab.close()
