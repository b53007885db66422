"""Proof of order: has what conflicts been put in order by the rules, or only by luck?

Every stream and every host thread has a vector clock. Work given to a stream knows what the stream has run before,
what the giving thread knows, and nothing else; waiting for an event adds what the event's stream had run. For each
byte range the last write and the reads since are kept as points on those clocks. An access that does not *know* of a
conflicting one before it is refused, whenever the two happened to run: that no interleaving goes wrong is proved by
any one of them (FastTrack, Flanagan and Freund, PLDI 2009, with intervals in place of variables).
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass, field

from narrowboat.errors import DeviceOrderError

Clock = dict[str, int]


@dataclass(slots=True)
class _Span:
    """What is known of one range of bytes, from its start to the next span's."""

    wrote: tuple[str, int, str] | None = None  # agent, its count, what it was
    reads: dict[str, tuple[int, str]] = field(default_factory=dict)
    mapped: bool = True

    def split(self) -> _Span:
        return _Span(self.wrote, dict(self.reads), self.mapped)


class Order:
    """Clocks of agents (streams, host threads), and the accesses of one memory. Thread-safe.

    Addresses that were never mentioned are taken to be mapped and never written.
    """

    def __init__(self) -> None:
        self._clocks: dict[str, Clock] = {}
        self._starts: list[int] = [0]
        self._spans: list[_Span] = [_Span()]
        self._lock = threading.RLock()  # a finalizer may ask for a clock in the middle
        self.checked = 0  # accesses

    def snapshot(self, agent: str) -> Clock:
        """What ``agent`` knows now."""
        with self._lock:
            return dict(self._clock(agent))

    def learn(self, agent: str, clock: Clock) -> None:
        """``agent`` has waited for whoever had that clock."""
        with self._lock:
            self._join(agent, clock)

    def learn_all(self, agent: str) -> None:
        """``agent`` has waited for everybody."""
        with self._lock:
            for clock in list(self._clocks.values()):
                self._join(agent, clock)

    def read(self, agent: str, address: int, nbytes: int, what: str) -> None:
        """``agent`` reads a range.

        Raises:
            DeviceOrderError: it is not mapped, or was written by something that ``agent`` has not waited for.
        """
        with self._lock:
            count, clock = self._step(agent)
            for span in self._over(address, nbytes):
                if not span.mapped:
                    raise DeviceOrderError(f"{what} reads bytes at {address:#x} that have no memory")
                if span.wrote is not None and span.wrote[1] > clock.get(span.wrote[0], 0):
                    raise DeviceOrderError(
                        f"used before ready: {what} ({agent}) has not waited for {span.wrote[2]} ({span.wrote[0]})"
                    )
                span.reads[agent] = (count, what)

    def write(self, agent: str, address: int, nbytes: int, what: str) -> None:
        """``agent`` writes a range.

        Raises:
            DeviceOrderError: it is not mapped, or is read or written by something that ``agent`` has not waited for.
        """
        with self._lock:
            count, clock = self._step(agent)
            for span in self._over(address, nbytes):
                if not span.mapped:
                    raise DeviceOrderError(f"{what} writes bytes at {address:#x} that have no memory")
                self._settled(span, clock, f"overwritten while in use: {what} ({agent})")
            self._alike(address, nbytes, _Span((agent, count, what)))

    def mapping(self, agent: str, address: int, nbytes: int, *, mapped: bool) -> None:
        """Memory comes to a range, or goes.

        Raises:
            DeviceOrderError: it goes while something may still use it.
        """
        with self._lock:
            count, clock = self._step(agent)
            for span in self._over(address, nbytes):
                self._settled(span, clock, "unmapped while in use: the host")
            # Fresh memory holds nothing: it is ready for whoever knows of the mapping.
            self._alike(address, nbytes, _Span((agent, count, "mapping"), mapped=mapped))

    def forget(self, address: int, nbytes: int) -> None:
        """A range is given back to the system: who has its addresses next need not know what was there."""
        with self._lock:
            self._alike(address, nbytes, _Span())

    def _settled(self, span: _Span, clock: Clock, who: str) -> None:
        if span.wrote is not None and span.wrote[1] > clock.get(span.wrote[0], 0):
            raise DeviceOrderError(f"{who} has not waited for {span.wrote[2]} ({span.wrote[0]})")
        for reader, (count, what) in span.reads.items():
            if count > clock.get(reader, 0):
                raise DeviceOrderError(f"{who} has not waited for {what} ({reader})")

    def _clock(self, agent: str) -> Clock:
        return self._clocks.setdefault(agent, {})

    def _join(self, agent: str, clock: Clock) -> None:
        mine = self._clock(agent)
        for other, count in clock.items():
            if count > mine.get(other, 0):
                mine[other] = count

    def _step(self, agent: str) -> tuple[int, Clock]:
        self.checked += 1
        clock = self._clock(agent)
        clock[agent] = clock.get(agent, 0) + 1
        return clock[agent], clock

    def _over(self, address: int, nbytes: int) -> list[_Span]:
        """The spans of exactly that range, cut out of what there was."""
        if nbytes <= 0:
            return []
        first, last = self._cut(address), self._cut(address + nbytes)
        return self._spans[first:last]

    def _alike(self, address: int, nbytes: int, span: _Span) -> None:
        """The same is known of all of a range: one span, so that their number does not grow with what has happened."""
        if nbytes > 0:
            first, last = self._cut(address), self._cut(address + nbytes)
            self._starts[first:last], self._spans[first:last] = [address], [span]

    def _cut(self, address: int) -> int:
        at = bisect_right(self._starts, address) - 1
        if self._starts[at] == address:
            return at
        self._starts.insert(at + 1, address)
        self._spans.insert(at + 1, self._spans[at].split())
        return at + 1
