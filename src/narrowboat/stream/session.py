"""The session: one streamed model, its plan, and what it measured."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from narrowboat.arena.ledger import Ledger
from narrowboat.errors import (
    NarrowboatError,
    SessionClosedError,
    StreamedModelError,
    UsageError,
)
from narrowboat.machine.malloc import set_malloc_policy
from narrowboat.machine.memory import resident_bytes
from narrowboat.machine.openmp import warn_about_openmp
from narrowboat.plan.result import Plan
from narrowboat.profile.skeleton import attach_slots
from narrowboat.profile.tiles import install, uninstall
from narrowboat.profile.use_trace import UseTrace
from narrowboat.profile.workload import Group
from narrowboat.quantities import format_bytes, parse_bytes
from narrowboat.stream.auto import follow_limits
from narrowboat.stream.blocks import BlockState, beyond, held_ranges, make_blocks
from narrowboat.stream.change import BudgetChange
from narrowboat.stream.engine import Engine
from narrowboat.stream.expert_ops import start_experts
from narrowboat.stream.ground import Ground
from narrowboat.stream.heap_guard import HeapGuard
from narrowboat.stream.integrity import Integrity
from narrowboat.stream.map import Maps
from narrowboat.stream.passes import PassRecord
from narrowboat.stream.prepare import NO_EXAMPLE, Prepared
from narrowboat.stream.probe import quick_bandwidth
from narrowboat.stream.reader import Reader, WeightsFile
from narrowboat.stream.refuse import refuse_moving_written, refuse_training
from narrowboat.stream.reuse import reusable
from narrowboat.stream.rows import RowReader
from narrowboat.stream.settle import learn, settle
from narrowboat.stream.stats import collect
from narrowboat.stream.swap import Swapper
from narrowboat.stream.tiers import Budget, new_budget
from narrowboat.stream.wrap import unwrap_modules, wrap_modules
from narrowboat.trace import Trace

log = logging.getLogger("narrowboat")
_SETTLE_AFTER = 2  # complete passes before the plan is made anew from what they measured
_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """Handle of a streamed model; ``nb.session(model)`` returns it. A context manager: leaving it closes it.

    Attributes:
        prepared: what its plans are made from.
        machine: the storage as measured.
        timeline: what happened when.
        plan: the plan in force (``print(session.plan)`` explains it).
        ledger: who holds how many bytes.
        baseline: resident bytes of the process when the session began.
        memory: what the process took since.
        files: the weights files, open.
        slab: the memory; None once closed.
        experts: the cache of experts that are read on demand; None where none are.
        records: what the last 256 passes took.
        settled: the plan rests on measured passes.
        maps: what is known about mapping the model.
        passes, complete_passes: calls that ended well; those of them that kept to the traced order.
    """

    plan: Plan

    def __init__(
        self,
        prepared: Prepared,
        *,
        budget: int,
        io: str,
        verify: str,
        ground: Ground,
        cleanup: Callable[[], None] | None = None,
    ) -> None:
        self.prepared = prepared
        self._weights = prepared.weights
        self._index = index = prepared.index
        self._budget = budget
        self._cleanup = cleanup
        self._pid = os.getpid()
        self.ground = ground
        self.memory = ground.memory
        self.baseline = self.memory.baseline
        self._closed = False
        self.ledger = Ledger()
        self.timeline = Trace()
        self.records: deque[PassRecord] = deque(maxlen=256)
        self.passes = 0
        self.complete_passes = 0
        self._change = BudgetChange(self)
        self.settled = False
        self.maps = Maps(self)
        self.following: threading.Event | None = None  # budget="auto"
        self.slab: Any = None
        pairs = zip(index.files, index.stamps, strict=True)
        self.files = [WeightsFile(path, stamp, direct=io != "buffered") for path, stamp in pairs]
        if io == "direct" and not all(file.direct for file in self.files):
            reason = next(file.refusal for file in self.files if not file.direct)
            self._close_files()
            raise UsageError(
                f"io='direct' was asked for, but {self.files[0].path} refuses direct I/O ({reason}); use io='auto'"
            )
        self._file_number = {str(file.path): i for i, file in enumerate(self.files)}
        storage = prepared.storage
        chunk = ground.chunk(storage.chunk, storage.depth)
        self.reader = Reader(self.files, chunk=chunk, workers=storage.depth, trace=self.timeline)
        try:
            channel = ground.connect(self.reader)
            self.machine = ground.machine(prepared, quick_bandwidth(self.reader, self.files))
            plan, groups = prepared.choose(self.machine, budget)
            set_malloc_policy(prepared.policy)  # gives back what building and tracing left free in the heap
            if prepared.tiling is not None:
                rows = RowReader(self.reader, self._file_number, [stamp.size for stamp in index.stamps])
                install(prepared.module, prepared.tiling, prepared.matched.numbers, rows)
            for weight in prepared.weights:
                weight.device = ground.torch_device
            attach_slots(prepared.module, prepared.matched)
            ground.adopt_buffers(prepared.module)
            swapper = Swapper(channel, self.ledger, ground.private)
            watch = ground.stopwatch(self.timeline)
            self.engine = Engine(prepared.weights, prepared.owned, self.reader, swapper, watch)
            self.guard = HeapGuard(self.memory, self.engine)
            self.experts = start_experts(self)
            self.engine.on_begin = self._before_pass
            self.engine.on_end = self._after_pass
            self.engine.on_touch = self._check_files
            self.engine.on_torn = self._readopt
            if verify != "off":
                integrity = Integrity(verify, index.digests, index.files[0])
                self.engine.on_arrival = lambda block: integrity.check(block, self._slab_in_force())
            modules = prepared.module.modules()
            self._norms = [m for m in modules if getattr(m, "track_running_stats", False) and list(m.buffers(False))]
            if prepared.trace is None:
                self.engine.observed = UseTrace()
            self._adopt(plan, groups)
        except BaseException:
            self.reader.close()
            self._close_files()
            if self.slab is not None:
                self.slab.close()
            ground.close()
            if prepared.tiling is not None:
                uninstall(prepared.module, prepared.tiling)
            raise
        wrap_modules(prepared.module, self.engine, ground.named)
        _open_sessions.add(self)
        warn_about_openmp()
        if prepared.trace is None:
            level = logging.INFO if prepared.why_untraced == NO_EXAMPLE else logging.WARNING
            log.log(
                level, "the model was not traced in advance (%s): its first call is the trace", prepared.why_untraced
            )

    # -- what a user reads -------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """Bytes the session may use over the process baseline; set it to change it while the session lives.

        ``"auto"`` follows the machine from then on; a size no longer does.

        Takes effect before the assignment returns, or, while a pass is in progress, at its next block boundary (less)
        or its end (more). What stays resident is not read again; what goes is given back at once; no answer changes.

        Raises:
            BudgetError: the new budget cannot hold the model; the one in force stays.
            QuantityError: it is no size.
            StreamedModelError: weights that would move have been written to; the change would be lost.
            SessionClosedError: the session is closed.
        """
        return self._budget

    @budget.setter
    def budget(self, value: Budget) -> None:
        self.change_budget(value, cause="asked")

    def change_budget(self, value: Budget, *, cause: str) -> None:
        """What setting ``budget`` does, with a ``cause`` for the trace."""
        if self.engine.closed:
            raise SessionClosedError(self.engine.closed)
        value = new_budget(value, self.ground.device, lambda: int(self.memory.held))
        if value == "auto":
            return follow_limits(self, self.prepared.enough())
        nbytes = parse_bytes(value, what="budget")
        self._change.check(nbytes)
        if cause == "asked":
            self.following = None
        self._change.ask(nbytes, cause)

    @property
    def min_budget(self) -> int:
        """The smallest budget in bytes with which this model can be streamed: anew, if that takes other tiles."""
        return self.plan.minimum

    @property
    def direct_io(self) -> bool:
        """Whether every weights file is read past the page cache."""
        return all(file.direct for file in self.files)

    @property
    def closed(self) -> bool:
        """Whether the session was closed."""
        return self._closed

    def stats(self) -> dict[str, Any]:
        """Measurements of the passes so far; ``stream.stats.collect`` has the table of keys."""
        return collect(self)

    @property
    def peak_bytes(self) -> int:
        """Most resident memory of the process over its baseline since the session began.

        From the kernel's high-water mark where it has risen since, else from samples.
        """
        return self.memory.peak

    def trace(self) -> Trace:
        """The timeline of the recent passes; ``.save_chrome(path)`` writes it for Perfetto."""
        return self.timeline

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def map(
        self, inputs: Iterable[Any], batch: int | None = None, *, progress: bool = False, errors: str = "raise"
    ) -> Iterator[Any]:
        """Yield the model's output for each of ``inputs``, in order; blocks are read once for several of them.

        For throughput, where single calls are for latency. Every input is a pass of its own, with the bits a call
        gives; a group of them goes through each block while it is in memory. Both ends are lazy: a group is pulled
        when its first output is asked for. What one input holds between blocks, times the group, counts against the
        budget. Call it in ``torch.inference_mode()`` or ``torch.no_grad()``, and keep to it while iterating.

        Args:
            inputs: the arguments of one call each: a tuple of positional ones, a dict of keyword ones, or a tensor.
                May be endless.
            batch: inputs per group, from 1 to 64; None: the fewest within 2 % of the best predicted throughput (the
                first passes of a session go one by one then, to be measured).
            progress: show a bar on stderr.
            errors: ``"raise"``: where an input fails, the outputs of the others of its group are delivered first,
                in order, and then ``MapError`` ends the iteration. ``"return"``: the ``MapError`` is yielded in
                its place, and the iteration goes on.

        Raises:
            UsageError: an argument cannot be used as given.
            BudgetError: the budget cannot hold ``batch`` inputs at once.
            MapError: an input failed; while iterating. What is wrong with the session, the model or its weights file
                (closed, gradients, altered) is raised as it is for a call.
        """
        return self.maps.run(inputs, batch, progress=progress, errors=errors)

    def close(self) -> None:
        """Give the memory back. The model's weights become unusable, with an error that says so; idempotent.

        Raises:
            UsageError: called by the model itself, in the middle of a sweep of ``map``.
        """
        if self._closed:
            return
        if self.engine.crew is not None and self.engine.crew.is_member():
            raise UsageError("a pass that goes through the model together with others cannot close their session")
        _open_sessions.discard(self)
        with self.engine.lock:
            self._closed = True
            try:
                if os.getpid() == self._pid:  # in a forked child, copying what others kept could wait for ever
                    self.engine.let_go()
            except NarrowboatError as error:
                log.warning("%s", error)
            self.engine.closed = (
                f"the session that streamed this model from {self._index.files[0]} is closed; "
                "stream the model again: nb.stream(...)"
            )
            self.reader.close()
            self._close_files()
            if self.slab is not None:
                self.slab.close()
                self.slab = None
            self.ground.close()
            if self.experts is not None:
                self.experts.close()
            self.ledger.set("resident", 0)
            self.ledger.set("window", 0)
        self.maps.dismiss()
        if self._cleanup is not None:
            self._cleanup()

    # -- how it works ------------------------------------------------------------------------------

    def _adopt(self, plan: Plan, groups: list[Group]) -> None:
        """Put a plan in force in memory of its own; every block has to be out."""
        if self.slab is not None:
            self.slab.close()
        self.slab = None
        self.slab = self.ground.slab(plan)
        self._use(plan, groups, {})

    def put_in_force(self, plan: Plan, groups: list[Group], *, budget: int | None = None) -> None:
        """Replace the plan; blocks and experts that are in and stay are left alone.

        Args:
            budget: bytes of the budget it was made for, where that is another.
        """
        log.info("new plan: %s predicted", f"{plan.predicted_latency * 1e3:.1f} ms")
        try:
            if self.experts is not None:  # first what they give: there is never more than the larger of the two
                self.experts.resize(min(plan.expert_bytes, self.experts.capacity))
            self._replace(plan, groups)
        except BaseException:
            # Half of it may be done: the next use begins anew with the plan that is noted.
            self.engine.torn = True
            raise
        if budget is not None:
            self._budget = budget
            self.memory.begin_anew()

    def _replace(self, plan: Plan, groups: list[Group]) -> None:
        before, slab = self.plan, self.slab
        if slab is None or plan.blocks != before.blocks or not self.ground.stays:
            self.engine.let_go()
            self._adopt(plan, groups)
            return
        moves = reusable(self.engine.arrived(), before, plan)
        kept = self.engine.let_go(plan.resident)
        for move in moves:
            if move.target != move.offset:
                slab.copy(move.offset, move.target, move.nbytes)
        old, new = held_ranges(before), held_ranges(plan)
        slab.release(beyond(old, new))  # first: there is never more than the larger of the two
        slab.hold(beyond(new, old), behind=True)
        self._use(plan, groups, kept, {move.index for move in moves})

    def _use(self, plan: Plan, groups: list[Group], kept: dict[int, BlockState], there: Collection[int] = ()) -> None:
        assert self.slab is not None
        bases, packed = self.ground.bases(plan), self._index.packed
        blocks = make_blocks(plan, groups, self._weights, self._file_number, kept, there, bases=bases, packed=packed)
        self.engine.adopt(plan, blocks, self.prepared.trace, self.slab)
        if self.experts is not None:
            self.experts.resize(plan.expert_bytes)
        self.plan = plan
        self.ledger.set("resident", plan.resident_bytes)
        self.ledger.set("window", plan.window_bytes)

    def refuse_written(self) -> None:
        """Before weights move.

        Raises:
            StreamedModelError: one was written to since it came in: that would be lost.
        """
        refuse_moving_written(self._weights)

    def _slab_in_force(self) -> Any:
        assert self.slab is not None
        return self.slab

    def _before_pass(self) -> None:
        refuse_training(self._weights, self._norms)
        self._check_files()
        if self.ground.device is None:
            self.engine.on_step = self.guard.hook(self.prepared.trace, self.prepared.policy, self._budget, self.alone)

    def _readopt(self) -> None:
        """Begin anew with the plan in force, in fresh memory, after an interruption."""
        try:
            self.refuse_written()
        except StreamedModelError as error:
            log.warning("after an interruption all weights are read anew: %s", error)
        self.engine.abandon()
        if self.experts is not None:
            self.experts.reset()
        self.ledger.set("off_plan", 0)
        self._adopt(self.plan, self.prepared.workload()[1])

    def _check_files(self) -> None:
        for file in self.files:
            file.check_path()
            file.check_open_file()

    def _after_pass(self, record: PassRecord | None) -> None:
        if record is not None and record.inputs == 1:
            self._take_note(record)
        self.prepared.together = 1  # nobody else is on the way any more
        self._change.follow()

    def note_sweep(self) -> int:
        """A sweep of several is over; returns by how many bytes it went over the budget, if that is not answered."""
        self._look()
        over = max(self.overrun(), 0)
        if over:
            self.memory.answered = self.memory.recent
        return over

    def beside_weights(self) -> int:
        """Bytes the process holds over its baseline and the arena; 0 where other sessions may hold some of them."""
        if not self.alone or self.ground.device is not None:
            return 0
        experts = self.experts.held if self.experts is not None else 0
        return max(resident_bytes() - self.baseline - self.plan.arena_bytes - experts, 0)

    def _take_note(self, record: PassRecord) -> None:
        self._look()
        self.ground.times(hold=not self.settled)
        if self.records:
            self.records[-1].forget_details()
        self.records.append(record)
        self.passes += 1
        self.complete_passes += record.complete
        observed = self.engine.observed
        if observed is not None:
            self.engine.observed = None
            if observed.events:
                learn(self, observed, record)
        elif self.maps.in_force:
            return  # what a pass beside a map takes says nothing of one alone
        elif not self.settled and record.complete and self.complete_passes >= _SETTLE_AFTER:
            self.settled = True
            settle(self, record)
            self.ground.settled(self.plan, self._budget)
        elif self.settled and self.overrun() > 0:
            settle(self, record)

    def _look(self) -> None:
        """After passes: are the files still those that were opened, and how much is held?"""
        for file in self.files:
            file.check_open_file()
        self.memory.rest(self._budget, self.plan.fixed_bytes - self.plan.expert_bytes)

    @property
    def alone(self) -> bool:
        """Whether no other session is open: the kernel counts for the process, and cannot say whose bytes they are."""
        return len(_open_sessions) == 1

    def overrun(self) -> int:
        """Bytes by which passes went over the budget unanswered; 0 where other sessions may have taken them."""
        if not self.alone:
            return 0
        return self.memory.overrun(self._budget, self.ledger.total)

    def _close_files(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):
                file.close()

    def dismantle(self) -> None:
        """Take wrappers and stand-ins off the model of a closed session; its parameters are on meta then."""
        unwrap_modules(self.prepared.module)
        for weight in self._weights:
            for slot in weight.slots:
                slot.release()
            weight.slots.clear()
        if self.prepared.tiling is not None:
            uninstall(self.prepared.module, self.prepared.tiling)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.passes} passes"
        return f"<narrowboat session: {format_bytes(self._budget)} budget, {state}>"


def _after_fork() -> None:
    """The reader's threads do not exist in a forked child: an error there, and not a wait for ever."""
    for session in list(_open_sessions):
        session.engine.closed = (
            "this process was forked from the one that streams the model, and its reader did not come along: "
            "start workers with the 'spawn' method, and stream the model in them"
        )
        session.reader.forget_threads()


os.register_at_fork(after_in_child=_after_fork)
