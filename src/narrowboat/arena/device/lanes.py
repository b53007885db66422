"""The emulated device's streams: one whose work runs in the caller's thread, and ones with a thread of their own."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import cast

from narrowboat.arena.device.interface import Event
from narrowboat.arena.device.order import Clock, Order
from narrowboat.errors import DeviceError


def host_agent() -> str:
    """The calling thread, in proofs of order."""
    return f"host thread {threading.get_ident()}"


class LaneEvent:
    """A mark in an emulated stream."""

    def __init__(self, order: Order, clock: Clock) -> None:
        self._order, self._clock = order, clock
        self._passed = threading.Event()
        self._failure: Callable[[], BaseException | None] = lambda: None
        self.at = 0.0

    def passed(self, failure: Callable[[], BaseException | None] | None = None) -> None:
        """The stream has come to the mark."""
        self.at = time.perf_counter()
        if failure is not None:
            self._failure = failure
        self._passed.set()

    def hold(self) -> None:
        """Wait for the mark without learning what was before it."""
        self._passed.wait()

    @property
    def clock(self) -> Clock:
        """What was before it."""
        return self._clock

    def done(self) -> bool:
        """See ``Event``."""
        return self._passed.is_set()

    def wait(self) -> None:
        """See ``Event``."""
        self._passed.wait()
        if (error := self._failure()) is not None:
            raise error
        self._order.learn(host_agent(), self._clock)

    def seconds_since(self, earlier: Event) -> float:
        """See ``Event``."""
        return self.at - cast(LaneEvent, earlier).at


class ComputeLane:
    """Work runs where and when it is given: a stream that is never behind the host.

    What it is *ordered after* is counted by the rules all the same.

    Args:
        order: where accesses are proved.
    """

    def __init__(self, order: Order, name: str) -> None:
        self._order, self.name = order, name

    def record(self, *, timed: bool = False) -> LaneEvent:
        """See ``Stream``."""
        self.submit()
        event = LaneEvent(self._order, self._order.snapshot(self.name))
        event.passed()
        return event

    def wait(self, event: Event) -> None:
        """See ``Stream``."""
        mark = cast(LaneEvent, event)
        mark.hold()
        self._order.learn(self.name, mark.clock)

    def synchronize(self) -> None:
        """See ``Stream``."""
        self._order.learn(host_agent(), self._order.snapshot(self.name))

    def submit(self) -> None:
        """Work is given to it: it is ordered after what the giving thread knows."""
        self._order.learn(self.name, self._order.snapshot(host_agent()))

    def run(self, task: Callable[[], None]) -> None:
        """Give it work."""
        task()


class CopyLane:
    """Work runs in a thread, in the order given.

    Args:
        order: where accesses are proved.
        name: of the thread.
        left: where its end is noted when nobody holds it any more: its work still goes on then.
    """

    def __init__(self, order: Order, name: str, left: deque[LaneEvent]) -> None:
        self._order, self.name = order, name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._giving = threading.Lock()  # a clock and its place in the queue go together
        self.failed: BaseException | None = None
        self._thread = threading.Thread(target=_drain, args=(self._work,), name=f"narrowboat-{name}", daemon=True)
        self._thread.start()
        weakref.finalize(self, _leave, order, name, self._work, left)

    def record(self, *, timed: bool = False) -> LaneEvent:
        """See ``Stream``."""
        with self._giving:
            self.submit()
            event = LaneEvent(self._order, self._order.snapshot(self.name))
            self._work.put(lambda: event.passed(lambda: self.failed))
        return event

    def wait(self, event: Event) -> None:
        """See ``Stream``."""
        mark = cast(LaneEvent, event)
        with self._giving:
            self.submit()
            self._order.learn(self.name, mark.clock)
            self._work.put(mark.hold)

    def synchronize(self) -> None:
        """See ``Stream``."""
        self.record().wait()

    def submit(self) -> None:
        """See ``ComputeLane``."""
        self._order.learn(self.name, self._order.snapshot(host_agent()))

    def run(self, task: Callable[[], None]) -> None:
        """Give it work."""

        def guarded() -> None:
            try:
                if self.failed is None:
                    task()
            except BaseException as error:
                self.failed = DeviceError(f"{self.name}: {error}")

        self._work.put(guarded)

    def give(self, prove: Callable[[], None], task: Callable[[], None]) -> None:
        """Give it work whose order is proved first, as one step."""
        with self._giving:
            self.submit()
            prove()
            self.run(task)


def _leave(
    order: Order, name: str, work: queue.SimpleQueue[Callable[[], None] | None], left: deque[LaneEvent]
) -> None:
    end = LaneEvent(order, order.snapshot(name))
    work.put(end.passed)
    work.put(None)  # ends the thread
    left.append(end)


def _drain(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (task := work.get()) is not None:
        task()
        del task
