"""How long the steps of a pass compute, and how long they wait.

On a device the host runs ahead, and what it sees of a step is how long it took to give its kernels. There marks in
the device's stream tell: one where a step's kernels end, one after what the stream waits for before the next. They
cost a few microseconds a step, so they are only set while somebody wants to know (``watching``); otherwise a pass is
marked where it begins, where it waits for a block, and where it ends. Marks are read when the device has passed them,
never by holding the host.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from narrowboat.arena.device.interface import Device, Event
from narrowboat.stream.lane import ComputeLane
from narrowboat.stream.passes import PassRecord
from narrowboat.trace import Trace


class Stopwatch:
    """For passes whose kernels run in the calling thread.

    Args:
        timeline: where computing and waiting are drawn.
    """

    def __init__(self, timeline: Trace) -> None:
        self._lane = ComputeLane(timeline)
        self._resumed = 0.0
        self.record = PassRecord()

    def begin(self, record: PassRecord) -> None:
        """A pass begins."""
        self.record = record
        self._resumed = record.started
        self._lane.begin(record.started)

    def step_ends(self, pos: int) -> None:
        """An event: the step at ``pos`` is over; -1 where none was."""
        if pos >= 0:
            self.record.step_seconds[pos] += time.perf_counter() - self._resumed

    def resume(self) -> None:
        """What the event had to do is done, and the next step computes."""
        self._resumed = time.perf_counter()

    def waited(self, name: str, before: float, after: float) -> None:
        """A wait for ``name``, which is not computing."""
        self._resumed += after - before
        self._lane.add(name, before, after)

    def holds_up(self, block: str) -> None:
        """A block is not there yet, as far as the host knows: what follows may hold up the kernels, on a device."""

    def goes_on(self) -> None:
        """The block is there, or the kernels to come will wait for it by themselves."""

    def end(self, now: float) -> None:
        """The pass is over."""
        self._lane.add("", now)


@dataclass(eq=False, slots=True)
class _Marks:
    """Of one pass."""

    record: PassRecord
    begin: Event
    end: Event
    ends: list[tuple[int, Event]]  # the step that ended, mark
    resumes: list[Event]
    waits: list[tuple[str, Event, Event]]  # block, marks before and after


class DeviceStopwatch(Stopwatch):
    """For passes whose kernels run on a device.

    Args:
        device: which.

    Attributes:
        watching: mark every step.
    """

    def __init__(self, timeline: Trace, device: Device) -> None:
        super().__init__(timeline)
        self._device = device
        self.watching = True
        self._ends: list[tuple[int, Event]] = []
        self._resumes: list[Event] = []
        self._waits: list[tuple[str, Event, Event]] = []
        self._held: tuple[str, Event] | None = None
        self._begin: Event | None = None
        self._unread: deque[_Marks] = deque(maxlen=256)

    def begin(self, record: PassRecord) -> None:
        """See ``Stopwatch``."""
        super().begin(record)
        self._ends, self._resumes, self._waits = [], [], []
        self._begin = self._mark()

    def _mark(self) -> Event:
        return self._device.compute().record(timed=True)

    def step_ends(self, pos: int) -> None:
        """See ``Stopwatch``."""
        if self.watching:
            self._ends.append((pos, self._mark()))

    def resume(self) -> None:
        """See ``Stopwatch``."""
        super().resume()
        if self.watching:
            self._resumes.append(self._mark())

    def holds_up(self, block: str) -> None:
        """See ``Stopwatch``."""
        self._held = block, self._mark()

    def goes_on(self) -> None:
        """See ``Stopwatch``."""
        if self._held is not None:
            (block, before), self._held = self._held, None
            self._waits.append((block, before, self._mark()))

    def end(self, now: float) -> None:
        """See ``Stopwatch``."""
        super().end(now)
        assert self._begin is not None
        marks = _Marks(self.record, self._begin, self._mark(), self._ends, self._resumes, self._waits)
        self._unread.append(marks)

    def read(self, *, hold: bool = False) -> None:
        """Put the device's times in the records of the passes that it has come to the end of.

        Args:
            hold: wait for all of them.
        """
        while self._unread and (hold or self._unread[0].end.done()):
            marks = self._unread.popleft()
            if hold:
                marks.end.wait()
            _fill(marks)


def _fill(marks: _Marks) -> None:
    record = marks.record
    record.latency = marks.end.seconds_since(marks.begin)
    stalls: dict[str, float] = {}
    for block, before, after in marks.waits:
        stalls[block] = stalls.get(block, 0.0) + after.seconds_since(before)
    # The host's own waits are among them: they only hold the device up for what is left when its work runs out.
    record.stall_by_block, record.stall = stalls, sum(stalls.values())
    if not marks.ends:
        return
    steps = [0.0] * record.steps
    resumed = marks.begin
    for (pos, ended), again in zip(marks.ends, marks.resumes, strict=False):
        if 0 <= pos < len(steps):
            steps[pos] += ended.seconds_since(resumed)
        resumed = again
    record.step_seconds = steps
