"""Where a storage that left the device is, and what is under way for it."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

import torch

from narrowboat.arena.device.interface import Event, Stream
from narrowboat.train.spill import Ticket as StoredTicket


class Leaving:
    """A storage of the device whose copy out is under way, and the stream that made it."""

    __slots__ = ("event", "nbytes", "storage", "stream")

    def __init__(self, storage: torch.UntypedStorage, event: Event, stream: Stream) -> None:
        self.storage: torch.UntypedStorage | None = storage
        self.nbytes = storage.nbytes()
        self.event, self.stream = event, stream


class Arriving:
    """A storage of the device that is brought back.

    Attributes:
        storage: the target, or the original where it is still there.
        event: after the copy in; None where none was given to the device (yet).
        fetch: from storage, by the thread that reads; it gives the bytes where it found no slot for them. None where
            they are in a slot already.
    """

    __slots__ = ("event", "fetch", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.event: Event | None = None
        self.fetch: Future[torch.UntypedStorage | None] | None = None


class Place:
    """Where one spilled storage is.

    Attributes:
        offset: of its slot; None if it has none (any more).
        out: after its copy to the slot.
        leaving: holds the original for as long as it is there.
        moving: it is on its way from the slot to storage.
        beyond: it is on its way or there.
        stored: in the spill file; None if it is not.
        read: from its slot.
        dead: released.
        kept: the original, where there was no room for it.
    """

    __slots__ = ("beyond", "dead", "kept", "leaving", "moving", "nbytes", "offset", "out", "read", "stored")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.offset: int | None = None
        self.out: Event | None = None
        self.leaving: Leaving | None = None
        self.moving = self.beyond = self.read = self.dead = False
        self.stored: StoredTicket | None = None
        self.kept: torch.UntypedStorage | None = None

    @property
    def original(self) -> torch.UntypedStorage | None:
        """The storage that was given, as long as it is on the device."""
        return self.leaving.storage if self.leaving is not None else self.kept


class Ticket:
    """A storage that was spilled. Dropping the last reference releases it.

    Attributes:
        nbytes: bytes of the storage.
    """

    __slots__ = ("__weakref__", "_freed", "_place", "nbytes")

    def __init__(self, nbytes: int, freed: deque[Place]) -> None:
        self.nbytes = nbytes
        self._place = Place(nbytes)
        self._freed: deque[Place] | None = freed

    @property
    def released(self) -> bool:
        """Whether its room was given back."""
        return self._freed is None

    def _release(self) -> None:
        # May run in the middle of anything, as garbage collection does: only steps that nothing can come between.
        self._freed, freed = None, self._freed
        if freed is not None:
            freed.append(self._place)

    def __del__(self) -> None:
        self._release()
