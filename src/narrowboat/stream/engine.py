"""The swap engine: before a step runs its weights are in; the prefetcher runs ahead and wraps into the next pass.

Every entry to and exit from a module is an event. The traced order of events says which blocks each step needs; the
engine walks along it, lets go of the blocks whose hold has ended, waits for those that begin, and submits reads for
the following ones as far as free addresses go. All of that happens in the model's own thread, at events: space only
comes free there. The reader's threads do nothing but read.

The order is a prediction, for speed. An event out of order makes the walk jump to where the trace has it; an event the
trace does not know brings in what that module is known to use; an operator that meets a stand-in loads it then and
there (``touching``). None of them changes an answer.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from narrowboat.arena.ledger import Ledger
from narrowboat.arena.slab import Slab
from narrowboat.arena.slot import Slot, Weight
from narrowboat.errors import BudgetError, SessionClosedError, StreamedModelError
from narrowboat.plan.make import Plan
from narrowboat.profile.use_trace import ENTER, EXIT, Event, UseTrace
from narrowboat.quantities import format_bytes
from narrowboat.stream.blocks import BlockState, State
from narrowboat.stream.passes import PassRecord
from narrowboat.stream.reader import Reader
from narrowboat.trace import Event as TimelineEvent
from narrowboat.trace import Trace

Hold = tuple[int, int, BlockState]  # first step, last step, block


class Engine:
    """Moves blocks in and out around the model's own calls.

    Args:
        weights: all weights of the model.
        owned: for each module number, the weights registered on that module itself.
        reader: brings bytes in.
        ledger: who holds how many bytes.
        timeline: where reads, computing and stalls are noted.

    Attributes:
        lock: held by the thread whose call is in progress; calls from other threads wait.
        record: measurements of the pass in progress.
        on_begin, on_end: called at the outermost entry and after the outermost exit of a pass.
        misses: operators that met a stand-in.
        jumps: events out of the traced order.
    """

    def __init__(
        self, weights: Sequence[Weight], owned: dict[int, list[int]], reader: Reader, ledger: Ledger, timeline: Trace
    ) -> None:
        self.weights = list(weights)
        self.lock = threading.RLock()
        self.record = PassRecord()
        self.observed: UseTrace | None = None
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[PassRecord | None], None] = lambda record: None
        self.misses = 0
        self.jumps = 0
        self.closed = ""
        self._owned = owned
        self._reader = reader
        self._ledger = ledger
        self._timeline = timeline
        self._depth = 0
        self._failed = False
        self._slab: Slab | None = None
        self._room_off_plan = 0
        self.blocks: list[BlockState] = []
        self._block_of: dict[int, BlockState] = {}
        self._events: list[Event] = []
        self._where: dict[Event, list[int]] = {}
        self._pos = -1
        self._pinned: dict[BlockState, int] = {}  # block -> last step of the hold; -1: until the next event
        self._clear_order()
        self._resumed = 0.0
        self._computing: tuple[str, float] = ("", 0.0)
        for weight in self.weights:
            weight.owner = self

    # -- plans -----------------------------------------------------------------------------------

    def adopt(self, plan: Plan, blocks: list[BlockState], trace: UseTrace | None, slab: Slab) -> None:
        """Put ``plan`` in force: every block gets its place, and views are bound to it.

        Blocks of the plan before have to be out (``let_go``).
        """
        self._slab = slab
        self.blocks = blocks
        self._block_of = {weight.index: block for block in blocks for weight in block.weights}
        self._room_off_plan = max(plan.budget - plan.fixed_bytes - plan.arena_bytes, 0)
        for block in blocks:
            if block.offset is not None:
                block.bind(slab, block.offset)
        self._events = trace.events if trace is not None else []
        self._where = {}
        for step, event in enumerate(self._events):
            self._where.setdefault(event, []).append(step)
        self._holds: list[Hold] = sorted(
            (
                (first, last, blocks[i])
                for i, b in enumerate(plan.blocks)
                for first, last in b.holds
                if trace is not None
            ),
            key=lambda hold: (hold[0], hold[1], hold[2].index),
        )
        self._arrange(self._holds)
        self._uses_of_module: dict[int, list[BlockState]] = {}
        for first, _, block in self._holds:
            number, kind = self._events[first]
            if kind == ENTER:
                self._uses_of_module.setdefault(number, []).append(block)
        self._prefetch()

    def _clear_order(self) -> None:
        self._holds = []
        self._uses_of_module = {}
        self._arrange([])

    def _arrange(self, holds: list[Hold]) -> None:
        """Lay out what begins and ends at each step, and put the prefetcher at the start."""
        self._order = holds
        self._firsts = [first for first, _, _ in holds]
        self._begins: dict[int, list[Hold]] = {}
        for hold in holds:
            self._begins.setdefault(hold[0], []).append(hold)
        self._head = 0  # uses begun, counted over passes
        self._cursor = 0  # uses provided for
        self._has_residents = any(block.resident for _, _, block in holds)

    def let_go(self) -> None:
        """Take every block out and forget the plan; nothing may be running."""
        self._reader.drain()
        self._rewind(0)
        for block in list(self._pinned):
            self._unpin(block)
        for block in self.blocks:
            if block.state is State.READING:
                block.state = State.IN  # drained: its bytes arrived, or failed; either way they go now
            self._evict(block)
            if block.offset is not None:
                for weight in block.weights:
                    for slot in weight.slots:
                        slot.other = None
                        slot._storage = None
        self.blocks = []
        self._block_of = {}
        self._clear_order()

    # -- events ----------------------------------------------------------------------------------

    def enter(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module's forward begins. The caller holds the lock and calls ``leave`` in any case."""
        self._depth += 1
        if self._depth == 1:
            self._begin(args, kwargs)
        self._event((number, ENTER))

    def leave(self, number: int) -> None:
        """A module's forward has ended, or failed."""
        try:
            if not self._failed:
                self._event((number, EXIT))
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._end()

    def fail(self) -> None:
        """The call in progress raised; no more weights are brought in for it."""
        self._failed = True

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._failed = False
        if self.closed:
            self._failed = True
            raise SessionClosedError(self.closed)
        try:
            self.on_begin()
        except BaseException:
            self._failed = True
            raise
        self._pos = -1
        if self._head % (len(self._order) or 1):
            self._rewind(0)
        now = time.perf_counter()
        self.record = PassRecord(
            started=now, steps=len(self._events), read_before=self._reader.bytes_read, busy_before=self._reader.busy()
        )
        self._resumed = now
        self._computing = ("", now)

    def _end(self) -> None:
        now = time.perf_counter()
        self._timeline_compute("", now)
        for block in list(self._pinned):
            self._unpin(block)
        complete = not self._failed and not self.record.jumped and self._pos == len(self._events) - 1
        record = self.record
        record.finish(now, self._reader.bytes_read, self._reader.busy(), complete)
        if self._order and self._head % len(self._order):
            self._rewind(0)
        if not self._failed:
            self._drop_loaded_residents()
        self.on_end(None if self._failed else record)

    def _event(self, event: Event) -> None:
        now = time.perf_counter()
        pos = self._pos
        if pos >= 0:
            self.record.spent(pos, now - self._resumed)
        if self.observed is not None:
            self.observed.open_step(event)
        following = pos + 1
        events = self._events
        if following < len(events) and events[following] == event:
            self._pos = following
            self._expire(following)
            known = True
        else:
            known = bool(events) and self._jump(event)
            if not known:
                self._off_trace(event)
        begins = self._begins.get(self._pos) if known else None
        if begins:
            for _, last, block in begins:
                self._consume(block)
                self._pin(block, last)
            for _, _, block in begins:
                self._bring(block)
        if self._cursor < self._head + len(self._order):
            self._prefetch()
        self._resumed = time.perf_counter()

    def _expire(self, step: int) -> None:
        for block, last in list(self._pinned.items()):
            if last < step:
                self._unpin(block)

    def _jump(self, event: Event) -> bool:
        """The pass left the traced order: go on from where the trace has ``event`` next; False if nowhere."""
        self.record.jumped = True
        self.jumps += 1
        places = self._where.get(event)
        if not places:
            return False
        at = bisect_left(places, self._pos + 1)
        target = places[at] if at < len(places) else places[0]
        for block in list(self._pinned):
            self._unpin(block)
        self._pos = target
        head = bisect_left(self._firsts, target)
        self._rewind(head)
        for first, last, block in self._order[:head]:
            if first < target <= last:  # held over this step, begun before it
                self._pin(block, last)
                self._bring(block)
        return True

    def _off_trace(self, event: Event) -> None:
        """An event the trace does not know: keep what the interrupted step holds, and serve the module itself."""
        for block, last in list(self._pinned.items()):
            if self._pos < 0 or last < self._pos:
                self._unpin(block)
        if event[1] == ENTER:
            self._bring_own(event[0])

    def _bring_own(self, number: int) -> None:
        """Bring in what a module is known to use, outside the traced order."""
        known = self._uses_of_module.get(number)
        if known is None:
            known = []
            for index in self._owned.get(number, ()):
                block = self._block_of.get(index)
                if block is not None and block not in known:
                    known.append(block)
                if self.observed is not None:
                    self.observed.use(index)
        for block in known:
            if block not in self._pinned:
                # A block whose place is taken by one in use stays out: operators that touch it load it.
                if any(other.pins for other in block.meets):
                    continue
                self._pin(block, -1)
                self._bring(block)

    # -- bringing in and letting go ----------------------------------------------------------------

    def _pin(self, block: BlockState, last: int) -> None:
        if block not in self._pinned:
            block.pins += 1
        self._pinned[block] = max(last, self._pinned.get(block, -1))

    def _unpin(self, block: BlockState) -> None:
        if self._pinned.pop(block, None) is not None:
            block.pins -= 1
            if block.private is not None and block.pins == 0:
                self._evict(block)

    def _bring(self, block: BlockState) -> None:
        """Return with the block's weights in and shown."""
        if block.state is not State.IN:
            if block.state is State.OUT:
                self._make_place(block)
                self._submit(block, urgent=True)
            before = time.perf_counter()
            self._finish(block)
            after = time.perf_counter()
            self.record.stalled(block.index, after - before)
            self._resumed += after - before  # a wait in the middle of a step is not computing
            self._timeline_compute(block.name, before, after)
        block.show()

    def _finish(self, block: BlockState) -> None:
        job = block.job
        assert job is not None
        try:
            self._reader.wait(job)
        except BaseException:
            if job.done:
                block.state, block.job = State.OUT, None
            raise
        block.state, block.job = State.IN, None

    def _make_place(self, block: BlockState) -> None:
        """Free the block's addresses, or give it memory of its own if those in use need them."""
        for other in block.meets:
            if other.state is State.READING:
                self._finish(other)
            if other.state is State.IN and other.pins and self._pinned.get(other) == -1:
                self._unpin(other)  # brought in by an operator earlier in this step; that operator is done
            if other.state is State.IN and other.pins:
                self._give_private(block)
                return
        for other in block.meets:
            if other.state is State.IN:
                if other.claims:
                    self._unclaim()
                self._evict(other)
        if block.offset is None and block.private is None:
            self._give_private(block)

    def _give_private(self, block: BlockState) -> None:
        if block.nbytes > self._room_off_plan + self._slack():
            raise BudgetError(
                f"{block.name} ({format_bytes(block.nbytes)}) is used outside the traced order while its place in "
                "memory is in use, and the budget has no room beside the plan: raise the budget by that much, or pass example "
                "inputs that take this path",
                minimum=self._ledger.total + block.nbytes,
                limiter=block.name,
            )
        block.private = Slab(block.nbytes)
        self._ledger.add("off_plan", block.nbytes)
        self._rebind(block)

    def _slack(self) -> int:
        return max(1 << 20, (self._slab.nbytes if self._slab else 0) // 50)

    def _rebind(self, block: BlockState) -> None:
        slab, base = (block.private, 0) if block.private is not None else (self._slab, block.offset)
        if slab is not None and base is not None:
            block.bind(slab, base)

    def _submit(self, block: BlockState, *, urgent: bool = False) -> None:
        slab = block.private if block.private is not None else self._slab
        assert slab is not None
        extents = block.extents
        if block.private is not None:
            base = min(e.target for e in extents)
            extents = [type(e)(e.file, e.offset, e.nbytes, e.target - base) for e in extents]
        block.job = self._reader.submit(block.name, slab, extents, urgent=urgent)
        block.state = State.READING

    def _evict(self, block: BlockState) -> None:
        """Put stand-ins where the block's weights were; bytes that others kept are moved aside first."""
        if block.state is State.OUT:
            return
        block.state, block.job = State.OUT, None
        written = ""
        if block.shown:
            block.shown = False
            for weight in block.weights:
                kept = False
                for slot in weight.slots:
                    written = written or (weight.name if slot.written else "")
                    kept = slot.take_out() or kept
                if kept:
                    self._rescue(block, weight)
        if block.private is not None:
            self._ledger.add("off_plan", -block.nbytes)
            for weight in block.weights:
                for slot in weight.slots:
                    slot.other = slot._storage = None
            block.private.close()
            block.private = None
            self._rebind(block)
        if written:
            raise StreamedModelError(
                f"weight {written!r} was modified in place while streamed; the change is lost, because weights are "
                "read from their file: call model.eval() if this is a normalisation layer, or train with nb.train_step"
            )

    def _rescue(self, block: BlockState, weight: Weight) -> None:
        slab, base = (block.private, 0) if block.private is not None else (self._slab, block.offset)
        place = block.places[block.weights.index(weight)]
        for slot in weight.slots:
            if slot.kept:
                self._ledger.add("escaped", slot.rescue())
            if slab is not None and base is not None:
                slot.bind(slab.tensor(base + place, weight.entry.dtype, weight.entry.shape))

    # -- prefetching -----------------------------------------------------------------------------

    def _consume(self, block: BlockState) -> None:
        """One use of the traced order begins."""
        if self._head < self._cursor:
            block.claims -= 1
        else:
            self._cursor += 1
        self._head += 1

    def _prefetch(self) -> None:
        """Submit reads for the coming uses, in their order, as far as addresses are free."""
        order = self._order
        count = len(order)
        limit = self._head + count
        while self._cursor < limit:
            block = order[self._cursor % count][2]
            if block.state is State.OUT and block.pins == 0:
                for other in block.meets:
                    if other.state is State.READING and other.claims == 0 and other.job is not None and other.job.done:
                        self._settle(other)
                    if other.state is not State.OUT and not other.idle:
                        return
                for other in block.meets:
                    self._evict(other)
                self._submit(block)
            block.claims += 1
            self._cursor += 1

    def _settle(self, block: BlockState) -> None:
        assert block.job is not None
        block.state = State.OUT if block.job.error is not None else State.IN
        block.job = None

    def _unclaim(self) -> None:
        """Take back what the prefetcher has provided for."""
        count = len(self._order)
        while self._cursor > self._head:
            self._cursor -= 1
            self._order[self._cursor % count][2].claims -= 1

    def _rewind(self, head: int) -> None:
        self._unclaim()
        self._head = self._cursor = head

    def _drop_loaded_residents(self) -> None:
        """Once a resident block is in, it needs no more attention: walk only over the streamed ones."""
        for _, _, block in self._order:
            if block.resident and block.state is State.READING and block.job is not None and block.job.done:
                self._settle(block)
        if self._has_residents and all(b.state is State.IN for _, _, b in self._order if b.resident):
            self._unclaim()
            for _, _, block in self._order:
                if block.resident:
                    block.show()
            self._arrange([hold for hold in self._holds if not hold[2].resident])
            self._prefetch()

    # -- operators that meet a stand-in ------------------------------------------------------------

    @contextmanager
    def touching(self, weights: list[Weight]) -> Iterator[Callable[[Slot], torch.Tensor]]:
        """Within the context the weights are in. Called when an operator meets a stand-in.

        Raises:
            SessionClosedError: nobody is left to load them.
        """
        with self.lock:
            if self.closed:
                raise SessionClosedError(self.closed)
            inside = self._depth > 0
            blocks = []
            self.misses += inside
            for weight in weights:
                if self.observed is not None:
                    self.observed.use(weight.index)
                block = self._block_of.get(weight.index)
                if block is not None and block not in blocks:  # else it has no bytes
                    blocks.append(block)
            guarded: list[BlockState] = []
            try:
                for block in blocks:
                    block.pins += 1
                    guarded.append(block)
                    self._bring(block)
                yield lambda slot: slot.view if slot.other is not None else _empty(slot)
            finally:
                for block in guarded:
                    block.pins -= 1
                    if inside and block.state is State.IN:
                        # A view made of it may live until the step ends.
                        self._pin(block, -1 if block not in self._pinned else self._pinned[block])
                    elif block.pins == 0 and block.private is not None:
                        self._evict(block)
            if not inside and not blocks:
                return

    def _timeline_compute(self, name: str, now: float, resume: float | None = None) -> None:
        current, since = self._computing
        if now > since:
            self._timeline.add(TimelineEvent("compute", current, since, now))
        if resume is not None and resume - now > 2e-5:
            self._timeline.add(TimelineEvent("stall", name, now, resume))
        self._computing = (name, resume if resume is not None else now)


def _empty(slot: Slot) -> torch.Tensor:
    entry = slot.weight.entry
    return torch.empty(entry.shape, dtype=entry.dtype)
