"""Storages on their way from the device and back to it: whose memory is held for how long."""

from __future__ import annotations

from collections import deque

import torch

from narrowboat.arena.device.interface import Event, Stream
from narrowboat.train.device.tickets import Arriving, Leaving, Place


class Departures:
    """Originals whose copies out are under way, in the order of those."""

    def __init__(self) -> None:
        self._leaving: deque[Leaving] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes of the device that they hold."""
        return sum(each.nbytes for each in self._leaving)

    def add(self, storage: torch.UntypedStorage, event: Event, stream: Stream) -> Leaving:
        """One more, made by work of ``stream``, after the last."""
        leaving = Leaving(storage, event, stream)
        self._leaving.append(leaving)
        return leaving

    def settle(self) -> None:
        """Let go of those whose copies are done."""
        while self._leaving and self._leaving[0].event.done():
            leaving = self._leaving.popleft()
            leaving.event.wait()  # it holds nothing up; what is known to be done is proved to be
            leaving.storage = None

    def shrink(self, nbytes: int) -> None:
        """Hold at most so many bytes: the stream of whatever goes before its time waits for its copy."""
        while self._leaving and self.nbytes > nbytes:
            leaving = self._leaving.popleft()
            leaving.stream.wait(leaving.event)
            leaving.storage = None


class Arrivals:
    """What is read ahead, by place; and what was read ahead for places that were released since."""

    def __init__(self) -> None:
        self._ahead: dict[Place, Arriving] = {}
        self._orphans: list[Arriving] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the device that they hold, those of originals that are leaving apart."""
        ahead = sum(place.nbytes for place in self._ahead if place.original is None)
        return ahead + sum(each.storage.nbytes() for each in self._orphans)

    def __contains__(self, place: Place) -> bool:
        return place in self._ahead

    def add(self, place: Place, arriving: Arriving) -> None:
        """Begun for ``place``."""
        self._ahead[place] = arriving

    def take(self, place: Place) -> Arriving | None:
        """What was begun for ``place`` and is the caller's from now on; None if nothing was."""
        return self._ahead.pop(place, None)

    def forget(self, place: Place) -> bool:
        """Nobody will ask for ``place``; whether its fetch was called off before it began."""
        arriving = self._ahead.pop(place, None)
        if arriving is None:
            return False
        if arriving.fetch is not None and arriving.fetch.cancel():
            return True
        if arriving.fetch is not None or arriving.event is not None:
            self._orphans.append(arriving)  # the copy may be writing to it
        return False

    def settle(self) -> None:
        """Let go of what nobody will ask for, where its copy is done."""
        waiting = []
        for orphan in self._orphans:
            fetched = orphan.fetch is None or orphan.fetch.done()
            if not fetched or (orphan.event is not None and not orphan.event.done()):
                waiting.append(orphan)
            elif orphan.event is not None:
                orphan.event.wait()
        self._orphans = waiting
