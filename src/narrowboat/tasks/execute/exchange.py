"""What the asking process and the executor share: rings for what is asked and told, and memory for tensors.

The memory has no name, so nothing is left when both processes are gone, however they went. Tensors cross once: the
asking side writes a job's inputs into a slot, the network reads them there, and its outputs are written beside them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import deque

from narrowboat.errors import StorageError
from narrowboat.tasks.execute.ring import Ring

_PAGE = mmap.PAGESIZE
# Slots and their bytes: offers, answers, events. A picture of now with what has happened since is the longest.
_RINGS = ((512, 1 << 10), (512, 1 << 12), (8, 1 << 17))
_RING_BYTES = sum(slots * nbytes for slots, nbytes in _RINGS)
_SPAN = 1 << 34  # of addresses; pages are taken when they are written


class Exchange:
    """One end. Make it with :meth:`create` in the asking process, with :meth:`attach` in the executor.

    Args:
        descriptors: the memory, then two eventfds of each ring.

    Attributes:
        offers: of jobs, and that they are not wanted any more; from the asking side.
        answers: from the executor.
        events: pictures of now, from the executor.
    """

    def __init__(self, descriptors: list[int]) -> None:
        self.descriptors = descriptors
        try:
            self._map = mmap.mmap(descriptors[0], _SPAN)
        except OSError as error:
            raise StorageError(f"no shared memory for tensors can be mapped: {error.strerror}") from error
        self.memory = memoryview(self._map)
        rings, start = [], 0
        for number, (slots, nbytes) in enumerate(_RINGS):
            end = start + slots * nbytes
            items, room = descriptors[1 + 2 * number : 3 + 2 * number]
            rings.append(Ring(self.memory[start:end], slots, nbytes, items, room))
            start = end
        self.offers, self.answers, self.events = rings

    @classmethod
    def create(cls) -> Exchange:
        """New memory and rings, which a child may inherit.

        Raises:
            StorageError: the system refuses.
        """
        made: list[int] = []
        try:
            made.append(os.memfd_create("narrowboat"))
            os.ftruncate(made[0], _SPAN)
            made.append(os.eventfd(0))  # offers: the executor has a thread that waits for nothing else
            made += [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2 * len(_RINGS) - 1)]
            return cls(made)
        except OSError as error:
            for descriptor in made:
                os.close(descriptor)
            raise StorageError(f"no shared memory for tensors: {error.strerror}") from error

    @classmethod
    def attach(cls, descriptors: list[int]) -> Exchange:
        """The other end; the rings' pages are taken now, before anybody counts what tasks take."""
        found = cls(descriptors)
        for start in range(0, _RING_BYTES, _PAGE):
            found.memory[start] = found.memory[start]
        return found

    def close(self) -> None:
        """Give it up; tensors that somebody still has over the memory keep it until they go."""
        for ring in (self.offers, self.answers, self.events):
            ring.close()
        self.memory.release()
        with contextlib.suppress(BufferError):
            self._map.close()
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []

    def give_back(self, start: int, nbytes: int) -> None:
        """Pages of the memory that nobody uses."""
        self._map.madvise(mmap.MADV_REMOVE, start, nbytes)


class Slots:
    """One task's slots in the memory: as many jobs may be on their way in or out.

    Args:
        start: of the first.
        nbytes: of one.
        count: of them.
    """

    def __init__(self, start: int, nbytes: int, count: int) -> None:
        self.start, self.nbytes, self.count = start, max(nbytes, 64), count
        self._free = deque(start + k * self.nbytes for k in range(count))
        self.retired = False

    def take(self) -> int | None:
        """Where a free one begins; None if there is none."""
        return self._free.popleft() if self._free else None

    def give(self, start: int) -> None:
        """It is free again."""
        self._free.append(start)

    @property
    def idle(self) -> bool:
        """Whether all are free."""
        return len(self._free) == self.count


class Areas:
    """Where each task's slots lie. Used by the asking side only.

    Args:
        exchange: whose memory.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._areas: list[Slots] = []

    def make(self, nbytes: int, count: int) -> Slots:
        """Slots of so many bytes.

        Raises:
            StorageError: there are not so many addresses.
        """
        self._sweep()
        size, start = _whole(max(nbytes, 64) * count), _whole(_RING_BYTES)
        for area in self._areas:  # in the order of their places
            if area.start - start >= size:
                break
            start = _whole(area.start + area.nbytes * area.count)
        if start + size > _SPAN:
            raise StorageError("the tasks' inputs and outputs together are larger than shared memory can be")
        made = Slots(start, nbytes, count)
        self._areas.append(made)
        self._areas.sort(key=lambda area: area.start)
        return made

    def retire(self, area: Slots) -> None:
        """Its task is gone; its pages go back when the last job has ended."""
        area.retired = True
        self._sweep()

    def _sweep(self) -> None:
        for area in [area for area in self._areas if area.retired and area.idle]:
            self._areas.remove(area)
            self._exchange.give_back(area.start, _whole(area.nbytes * area.count))


def _whole(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE
