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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from narrowboat.arena.slot import Slot, Weight
from narrowboat.errors import SessionClosedError, StreamedModelError, TiledWeightError
from narrowboat.plan.result import Plan
from narrowboat.profile.tiles import whole_asked_for
from narrowboat.profile.use_trace import ENTER, EXIT, Event, UseTrace
from narrowboat.stream.blocks import BlockState, State
from narrowboat.stream.caller import CastCache
from narrowboat.stream.passes import PassRecord
from narrowboat.stream.prefetch import Hold, Prefetcher
from narrowboat.stream.reader import Reader
from narrowboat.stream.stopwatch import Stopwatch
from narrowboat.stream.swap import Swapper, forget_views

if TYPE_CHECKING:
    from narrowboat.stream.lockstep import Crew


class Engine:
    """Moves blocks in and out around the model's own calls.

    Args:
        weights: all weights of the model.
        owned: for each module number, the weights registered on that module itself.
        reader: reads bytes.
        swapper: moves blocks.
        stopwatch: says what steps take.

    Attributes:
        lock: held by the thread whose call is in progress; calls from other threads wait.
        record: measurements of the pass in progress.
        on_begin, on_end: called at the outermost entry and after the outermost exit of a pass.
        on_boundary: called at every event, if set: a change of plan is wanted before the pass ends.
        on_step: called at every event, if set: somebody watches the memory.
        on_arrival: called with a block whose bytes have come in, before the model sees them; may refuse them.
        on_torn: called before the next use after an interruption; puts a plan in force anew.
        depth: how many wrapped calls are in progress.
        running: a pass is in progress.
        torn: an interruption may have struck in the middle of a change.
        on_touch: called before and after a weight is brought in outside a pass.
        crew: the threads of the sweep in progress, if one is (``stream.lockstep``).
        events: the traced order.
        where: the steps that each event opens, ascending.
        pos: the step in progress; -1 before the first.
        misses: operators that met a stand-in.
        jumps: events out of the traced order.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        owned: dict[int, list[int]],
        reader: Reader,
        swapper: Swapper,
        stopwatch: Stopwatch,
    ) -> None:
        self.weights = list(weights)
        self.lock = threading.RLock()
        self.record = PassRecord()
        self.observed: UseTrace | None = None
        self.on_begin: Callable[[], None] = lambda: None
        self.on_end: Callable[[PassRecord | None], None] = lambda record: None
        self.on_touch: Callable[[], None] = lambda: None
        self.on_torn: Callable[[], None] = lambda: None
        self.on_boundary: Callable[[], None] | None = None
        self.on_step: Callable[[], None] | None = None
        self.on_arrival: Callable[[BlockState], None] | None = None
        self.depth = 0
        self.running = False
        self.torn = False
        self.crew: Crew | None = None
        self.misses = 0
        self.jumps = 0
        self.closed = ""
        self._owned = owned
        self._reader = reader
        self._failed = False
        self._swapper = swapper
        self._prefetcher = Prefetcher(swapper)
        self.blocks: list[BlockState] = []
        self._block_of: dict[int, BlockState] = {}
        self.events: list[Event] = []
        self.where: dict[Event, list[int]] = {}
        self.pos = -1
        self._pinned: dict[BlockState, int] = {}  # block -> last step of the hold; -1: until the next event
        self._passing = False  # some block is held until the next event only
        self._uses_of_module: dict[int, list[BlockState]] = {}
        self._holds: list[Hold] = []
        self._has_residents = False
        self.stopwatch, self._casts = stopwatch, CastCache()
        for weight in self.weights:
            weight.owner = self

    # -- plans -----------------------------------------------------------------------------------

    def adopt(self, plan: Plan, blocks: list[BlockState], trace: UseTrace | None, slab: Any) -> None:
        """Put ``plan`` in force: every block gets its place.

        Blocks of the plan before have to be out (``let_go``).
        """
        self.blocks = blocks
        self._block_of = {weight.index: block for block in blocks for weight in block.weights}
        self._swapper.use(slab, max(plan.budget - plan.fixed_bytes - plan.arena_bytes, 0))
        self._swapper.held_besides = plan.fixed_bytes
        self.events = trace.events if trace is not None else []
        self.where = {}
        for step, event in enumerate(self.events):
            self.where.setdefault(event, []).append(step)
        holds = [(first, last, blocks[i]) for i, b in enumerate(plan.blocks) for first, last in b.holds]
        self._holds = sorted(holds if trace is not None else [], key=lambda hold: (hold[0], hold[1], hold[2].index))
        self._prefetcher.arrange(self._holds)
        self._has_residents = any(block.resident for _, _, block in self._holds)
        self._uses_of_module = {}
        for first, _, block in self._holds:
            number, kind = self.events[first]
            if kind == ENTER:
                self._uses_of_module.setdefault(number, []).append(block)
        if self.running:  # the pass goes on where it is
            self._prefetcher.jump(self.pos + 1)
        self._prefetcher.advance()

    def let_go(self, keep: Collection[int] = ()) -> dict[int, BlockState]:
        """Take the blocks out and forget the plan; those in use have to be among ``keep``.

        Args:
            keep: numbers of resident blocks that stay as they are, if they are in.

        Returns:
            What was kept, by number.
        """
        self.arrived()
        self._prefetcher.rewind()
        kept = {}
        for block in self.blocks:
            if block.index in keep and block.state is State.IN and block.resident and block.private is None:
                kept[block.index] = block
                continue
            self._unpin(block)
            self._swapper.evict(block)
            forget_views(block)
            block.meets.clear()  # cycles would wait for the garbage collector, megabytes of them
        self.blocks, self._holds = [], []
        self._block_of, self._uses_of_module = {}, {}
        self._prefetcher.arrange([])
        return kept

    def arrived(self) -> list[BlockState]:
        """The blocks whose bytes are at their places in the slab, those on their way waited for."""
        self._reader.drain()
        self._swapper.channel.drained()
        for block in self.blocks:
            self._swapper.settle(block)
        return [b for b in self.blocks if b.state is State.IN and b.private is None and b.offset is not None]

    def may_change(self, resident: Collection[int]) -> bool:
        """Whether another plan with this resident set could be put in force now: nothing else is in use."""
        return not self._failed and all(
            block.resident and block.index in resident and block.private is None for block in self._pinned
        )

    # -- events ----------------------------------------------------------------------------------

    def enter(self, number: int, depth: int) -> None:
        """A module's forward begins, ``depth`` calls deep. The caller holds the lock, and calls ``leave`` after it."""
        if depth == 0:
            self.begin()
        elif self._failed:
            # An inner module failed and the model went on: so does the pass, wherever it goes.
            self._failed = False
            self.record.jumped = True
        self.depth = depth + 1
        self.event((number, ENTER))

    def leave(self, number: int, depth: int, *, failed: bool = False) -> None:
        """A module's forward has ended, or failed."""
        if depth == 0 and not self.running:
            return  # refused before it began
        self._failed = failed
        try:
            if not failed:
                self.event((number, EXIT))
        finally:
            self.depth = depth
            if depth == 0:
                self.end()

    def begin(self) -> None:
        """A pass begins, or a sweep of several. The caller holds the lock, and calls ``end`` after it."""
        if self.closed:
            raise SessionClosedError(self.closed)
        self.mend()
        self.on_begin()
        self._failed = False
        self.running = True
        self.pos = -1
        if not self._prefetcher.at_start:
            self._prefetcher.rewind()
        now = time.perf_counter()
        self.record = PassRecord(
            started=now, steps=len(self.events), read_before=self._reader.bytes_read, busy_before=self._reader.busy()
        )
        self._swapper.channel.begin()
        self.stopwatch.begin(self.record)
        self._casts.turn_off()

    def mend(self) -> None:
        """After an interruption: nothing the engine had noted is trusted."""
        if self.torn:
            self.on_torn()
            self.torn = False

    def abandon(self) -> None:
        """Forget every block, and make every weight a stand-in."""
        self._reader.drain()
        self._swapper.channel.drained()
        self._pinned.clear()
        self.blocks, self._block_of = [], {}
        for weight in self.weights:
            for slot in weight.slots:
                slot.reset()
        self.running = False

    def end(self) -> None:
        """The pass or sweep has ended."""
        self._casts.restore()
        self.running = False
        now = time.perf_counter()
        self.stopwatch.end(now)
        for block in list(self._pinned):
            self._unpin(block)
        complete = not self._failed and not self.record.jumped and self.pos == len(self.events) - 1
        record = self.record
        record.finish(now, self._reader.bytes_read, self._reader.busy(), complete)
        if not self._prefetcher.at_start:
            self._prefetcher.rewind()
        if not self._failed:
            self._drop_loaded_residents()
        self.on_end(None if self._failed else record)

    def event(self, event: Event) -> None:
        """A step begins: let go of what has been used, and have in what it needs."""
        pos = self.pos
        self.stopwatch.step_ends(pos)
        if self.on_step is not None:
            self.on_step()
        if self.on_boundary is not None:
            self.on_boundary()
        if self.observed is not None:
            self.observed.open_step(event)
        following = pos + 1
        events = self.events
        if following < len(events) and events[following] == event:
            self.pos = following
            if following not in self._prefetcher.turns and not self._passing and self.observed is None:
                self.stopwatch.resume()
                return  # nothing begins or ends here
            self._expire(following)
            known = True
        else:
            known = bool(events) and self._jump(event)
            if not known:
                self._off_trace(event)
        begins = self._prefetcher.begins.get(self.pos) if known else None
        if begins:
            for _, last, block in begins:
                self._prefetcher.consume(block)
                self._pin(block, last)
            for _, _, block in begins:
                self._bring(block)
        self._prefetcher.advance()
        self.stopwatch.resume()

    # -- sweeps: several passes in lockstep ----------------------------------------------------------

    def next_begin(self, step: int) -> int:
        """The first step from ``step`` on at which a use begins that needs attention; beyond the last if none."""
        return self._prefetcher.next_begin(step)

    def move_to(self, step: int) -> None:
        """Go on to a later step of the traced order; what lies between has been run by others, or is left out."""
        if self._prefetcher.next_begin(self.pos + 1) < step:
            self._hold_over(step)
        self.pos = step - 1
        self.event(self.events[step])

    def stray(self, pos: int, event: Event) -> None:
        """A pass that has left the traced order after step ``pos`` goes on with ``event``, alone from now on."""
        self._prefetcher.jump(pos + 1)
        for block in list(self._pinned):
            self._unpin(block)
        self.pos = pos
        self.event(event)

    def _expire(self, step: int) -> None:
        self._passing = False
        for block, last in list(self._pinned.items()):
            if last < step:
                self._unpin(block)

    def _jump(self, event: Event) -> bool:
        """The pass left the traced order: go on from where the trace has ``event`` next; False if nowhere."""
        self.record.jumped = True
        self.jumps += 1
        places = self.where.get(event)
        if not places:
            return False
        at = bisect_left(places, self.pos + 1)
        target = places[at] if at < len(places) else places[0]
        self._hold_over(target)
        return True

    def _hold_over(self, step: int) -> None:
        """Be at ``step``, wherever the walk was, with the blocks in whose uses began before it."""
        for block in list(self._pinned):
            self._unpin(block)
        self.pos = step
        for _, last, block in self._prefetcher.jump(step):
            self._pin(block, last)
            self._bring(block)

    def _off_trace(self, event: Event) -> None:
        """An event the trace does not know: keep what the interrupted step holds, and serve the module itself."""
        for block, last in list(self._pinned.items()):
            if self.pos < 0 or last < self.pos:
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
        self._passing = self._passing or last < 0
        self._pinned[block] = max(last, self._pinned.get(block, -1))

    def _unpin(self, block: BlockState) -> None:
        if self._pinned.pop(block, None) is not None:
            block.pins -= 1
            if block.private is not None and block.pins == 0:
                self._swapper.evict(block)

    def _bring(self, block: BlockState) -> None:
        """Return with the block's weights in and shown."""
        comes = block.state is not State.IN or block.ready is not None
        if comes:
            self.stopwatch.holds_up(block.name)
        if block.state is not State.IN:
            if block.state is State.OUT:
                self._make_place(block)
                self._swapper.submit(block, urgent=True)
            before = time.perf_counter()
            self._swapper.finish(block)
            after = time.perf_counter()
            self.record.stalled(block.name, after - before)
            self.stopwatch.waited(block.name, before, after)
        if comes:
            self._swapper.channel.make_ready(block)
            self.stopwatch.goes_on()
        if self.on_arrival is not None:
            self._inspect(block)
        # Not shown where every operator has to meet the stand-ins, or its use goes unseen.
        self._swapper.put_in(block, show=self.observed is None)

    def _inspect(self, block: BlockState) -> None:
        if self.on_arrival is None or block.shown:
            return
        try:
            self.on_arrival(block)
        except BaseException:
            self._swapper.evict(block)
            raise

    def _make_place(self, block: BlockState) -> None:
        """Free the block's addresses, or give it memory of its own if those in use need them."""
        for other in block.meets:
            if other.state is State.READING:
                self._swapper.finish(other)
            if other.state is State.IN and other.pins and self._pinned.get(other) == -1:
                self._unpin(other)  # brought in by an operator earlier in this step; that operator is done
            if other.state is State.IN and other.pins:
                self._swapper.give_private(block)
                return
        for other in block.meets:
            if other.state is State.IN:
                if other.claims:
                    self._prefetcher.unclaim()
                self._swapper.evict(other)
        if block.offset is None and block.private is None:
            self._swapper.give_private(block)

    def _drop_loaded_residents(self) -> None:
        """Once a resident block is in, it needs no more attention: walk only over the streamed ones."""
        if not self._has_residents:
            return
        residents = [block for _, _, block in self._prefetcher.order if block.resident]
        for block in residents:
            self._swapper.settle(block)
        if all(block.state is State.IN for block in residents):
            self._prefetcher.unclaim()
            for block in residents:
                self._swapper.channel.make_ready(block)
                self._inspect(block)
                self._swapper.put_in(block)
            self._prefetcher.arrange([hold for hold in self._holds if not hold[2].resident])
            self._has_residents = False
            self._prefetcher.advance()

    # -- operators that meet a stand-in ------------------------------------------------------------

    @contextmanager
    def touching(self, weights: list[Weight]) -> Iterator[Callable[[Slot], torch.Tensor]]:
        """Within the context the weights are in. Called when an operator meets a stand-in.

        Raises:
            SessionClosedError: nobody is left to load them.
            TiledWeightError: one of them never is in as a whole.
        """
        # In a sweep the lock is held for all of its threads, of which one runs at a time.
        with self.lock if self.crew is None or not self.crew.is_member() else nullcontext():
            if self.closed:
                raise SessionClosedError(self.closed)
            inside = self.depth > 0
            if not inside:
                self._swapper.channel.begin()
                self.mend()
                self.on_touch()
            if not self.blocks:
                raise StreamedModelError("no plan is in force: a change of it was interrupted; call the model again")
            blocks = []
            self.misses += inside
            for weight in weights:
                if weight.tiled:
                    raise TiledWeightError(whole_asked_for(weight))
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
                if not inside:
                    self.on_touch()
                yield lambda slot: slot.view if slot.other is not None else slot.empty()
            except Exception:
                raise
            except BaseException:
                self.torn = True
                raise
            finally:
                for block in guarded:
                    block.pins -= 1
                    if inside and block.state is State.IN:
                        # A view made of it may live until the step ends.
                        self._pin(block, self._pinned.get(block, -1))
                    elif block.pins == 0 and block.private is not None:
                        self._swapper.evict(block)
