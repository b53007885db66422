"""Several passes of one model in lockstep: each block is read once, and all of them go through it while it is in.

Every input has a thread of its own, and its pass is the pass it would be alone: same calls, same shapes, same bits.
One thread runs at a time. It runs up to the *gate*, the next step at which a use of a streamed block begins, and hands
the turn to another that has not been there yet; the last one to arrive takes the engine through the gate, and goes on
as the first of the next round. So the engine sees one walk along the traced order: what has ended is let go, and the
prefetcher moves on, only behind the slowest.

Threads, because a pass can only be set aside together with its Python and C++ frames, and because grad mode,
autocast and the modes of PyTorch's dispatcher belong to a thread. Each has an OpenMP team of its own (libgomp keeps
one per thread that opens a parallel region); ``profile.memory`` has what that costs.

A pass that leaves the traced order forwards waits until the others have come that far. One that goes elsewhere is set
aside until the others are through, and then has the engine to itself.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from narrowboat.machine.malloc import give_back_own_heap
from narrowboat.profile.use_trace import ENTER, EXIT, Event

if TYPE_CHECKING:
    from narrowboat.stream.engine import Engine


class SweepEnded(BaseException):
    """Ends a pass from within when its sweep is given up; no ``except Exception`` of a model's may keep it."""


@dataclass(eq=False, slots=True)
class Member:
    """One input on its way.

    Attributes:
        call: runs its pass.
        value, error: what came of it.
        pos: the last step it has run, or runs.
        step: where it waits, at a gate.
        astray: it has left the traced order.
    """

    call: Callable[[], Any] | None = None
    value: Any = None
    error: BaseException | None = None
    pos: int = -1
    step: int = 0
    astray: bool = False
    running: bool = False  # its pass has begun, so that it waits for its baton, and no longer for its inbox
    sweep: int = 0
    inbox: queue.SimpleQueue[int] = field(default_factory=queue.SimpleQueue)
    baton: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None


class Crew:
    """The threads of a map, and whose turn it is.

    Args:
        engine: moves the blocks.

    Attributes:
        on_gate: called at every gate, if set.
        broken: what the engine met in the sweep, which was then given up.
    """

    def __init__(self, engine: Engine) -> None:
        self.on_gate: Callable[[], None] | None = None
        self.broken: BaseException | None = None
        self._engine = engine
        self._members: list[Member] = []
        self._by_thread: dict[int, Member] = {}
        self._sweep = 0
        self._home: queue.SimpleQueue[int] = queue.SimpleQueue()  # not an Event: Ctrl-C may strike in one's own code
        self._over = True
        self._stopping = False
        self._gate = 0
        self._behind: list[Member] = []  # not at the gate yet
        self._arrived: list[Member] = []
        self._astray: deque[Member] = deque()

    def is_member(self) -> bool:
        """Whether the calling thread is one of the crew's."""
        return threading.get_ident() in self._by_thread

    # -- the caller's side -------------------------------------------------------------------------

    def sweep(self, calls: Sequence[Callable[[], Any]]) -> list[tuple[Any, BaseException | None]]:
        """Run every call to its end, block by block; returns value and error of each, in order.

        An error that the engine itself meets ends the sweep (``broken``); unfinished calls have ``SweepEnded`` then.

        Raises:
            NarrowboatError: the engine refuses to begin, as it would an ordinary pass.
        """
        engine = self._engine
        with engine.lock:
            try:
                engine.begin()
                engine.record.inputs = len(calls)
                try:
                    return self._run(self._muster(calls))
                finally:
                    engine.end()
            except Exception:
                raise
            except BaseException:
                engine.torn = True
                engine.crew, engine.depth = None, 0
                raise

    def dismiss(self) -> None:
        """End the threads. No sweep may be in progress."""
        for member in self._members:
            member.inbox.put(0)
        for member in self._members:
            if member.thread is not None:
                member.thread.join()
                _gone(member.thread)
        self._members, self._by_thread = [], {}

    def _muster(self, calls: Sequence[Callable[[], Any]]) -> list[Member]:
        while len(self._members) < len(calls):
            member = Member()
            member.baton.acquire()
            member.thread = threading.Thread(
                target=self._work, args=(member,), name=f"narrowboat-map-{len(self._members)}", daemon=True
            )
            self._members.append(member)
            try:
                member.thread.start()
            except BaseException:
                if member.thread.ident is None:  # the system has no thread to give
                    self._members.remove(member)
                raise
        members = self._members[: len(calls)]
        for member, call in zip(members, calls, strict=True):
            member.call, member.value, member.error = call, None, None
            member.pos, member.step, member.astray, member.running = -1, 0, False, False
        return members

    def _run(self, members: list[Member]) -> list[tuple[Any, BaseException | None]]:
        engine = self._engine
        self._sweep += 1
        self._stopping, self.broken = False, None
        self._gate = engine.next_begin(0)
        self._behind, self._arrived = members[:0:-1], []
        self._astray.clear()
        self._home, self._over = queue.SimpleQueue(), False
        engine.crew, engine.depth = self, 1
        try:
            self._wake(members[0])
            self._home.get()
        finally:
            while not self._over:  # interrupted: whoever runs gives up at its next event
                with suppress(KeyboardInterrupt, queue.Empty):
                    self._stopping = True
                    members[0].inbox.put(self._sweep)  # it may not have been woken yet; twice does no harm
                    self._home.get(timeout=1.0)
            engine.crew, engine.depth = None, 0
        results = [(member.value, member.error) for member in members]
        for member in members:
            member.call = member.value = member.error = None
        return results

    # -- the members' side ---------------------------------------------------------------------------

    def call(self, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module's forward, in the thread of one of the passes."""
        me = self._by_thread[threading.get_ident()]
        self._event(me, (number, ENTER))
        result = forward(*args, **kwargs)
        self._event(me, (number, EXIT))
        return result

    def _work(self, me: Member) -> None:
        self._by_thread[threading.get_ident()] = me
        while True:
            sweep = me.inbox.get()
            if not sweep:
                give_back_own_heap()
                return
            if sweep == me.sweep:
                continue
            me.sweep, me.running = sweep, True
            try:
                assert me.call is not None
                me.value = me.call() if not self._stopping else None
                me.error = SweepEnded() if self._stopping else None
            except BaseException as error:
                me.error = error
            follower = self._follower()
            if follower is not None:
                self._wake(follower)
            else:
                self._over = True
                self._home.put(sweep)

    def _follower(self) -> Member | None:
        for waiting in (self._behind, self._arrived):
            if waiting:
                return waiting.pop()
        return self._astray.popleft() if self._astray else None

    def _wake(self, member: Member) -> None:
        if member.running:
            member.baton.release()
        else:
            member.inbox.put(self._sweep)

    def _give_turn(self, me: Member, other: Member | None) -> None:
        """Let ``other`` run; returns when it is this thread's turn again."""
        if other is not None and other is not me:
            self._wake(other)
            me.baton.acquire()
        if self._stopping:
            raise SweepEnded

    def _event(self, me: Member, event: Event) -> None:
        if self._stopping:
            raise SweepEnded
        engine = self._engine
        if me.astray:
            engine.event(event)
            return
        step = self._locate(me, event)
        if step is None:
            me.astray = True
            self._astray.append(me)
            self._give_turn(me, self._follower())
            engine.stray(me.pos, event)
            return
        while step >= self._gate:
            me.step = step
            if self._behind:
                self._arrived.append(me)
                self._give_turn(me, self._behind.pop())
            else:
                self._pass_gate(me)
        me.pos = step
        if not self._behind and step > engine.pos:
            self._move(step)  # the others are ahead: behind this one, blocks may go

    def _locate(self, me: Member, event: Event) -> int | None:
        """The step that ``event`` opens, at or after the one expected; None if the pass leaves the traced order."""
        following, events = me.pos + 1, self._engine.events
        if following < len(events) and events[following] == event:
            return following
        self._engine.jumps += 1
        places = self._engine.where.get(event, [])
        at = bisect_left(places, following)
        return places[at] if at < len(places) else None

    def _pass_gate(self, me: Member) -> None:
        """Everybody is at the gate, or wants to go beyond it: on to where the hindmost waits."""
        if self.on_gate is not None:
            self.on_gate()
        target = min(member.step for member in (me, *self._arrived))
        self._move(target)
        self._gate = self._engine.next_begin(target + 1)
        self._behind, self._arrived = self._arrived, []

    def _move(self, step: int) -> None:
        try:
            self._engine.move_to(step)
        except BaseException as error:
            self.broken, self._stopping = error, True
            raise


def _gone(thread: threading.Thread) -> None:
    """Wait until a thread that has ended has given back what it held; ``join`` returns a little earlier."""
    task = f"/proc/self/task/{thread.native_id}"
    for _ in range(100):
        if not os.path.exists(task):
            return
        time.sleep(0.001)
