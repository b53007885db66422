"""Swapping one block in and out: its place, its read, its views, and what others kept of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from narrowboat.arena.ledger import Ledger
from narrowboat.arena.slab import Slab
from narrowboat.arena.slot import Weight
from narrowboat.errors import BudgetError, StorageError, StreamedModelError
from narrowboat.quantities import format_bytes
from narrowboat.stream.blocks import BlockState, State
from narrowboat.stream.channel import Channel
from narrowboat.stream.reader import Extent


class Swapper:
    """Moves single blocks; knows nothing of their order.

    Args:
        channel: brings bytes to their places.
        ledger: who holds how many bytes.
        private: makes memory for a block beside the plan, of so many bytes.

    Attributes:
        room_off_plan: bytes of the budget that the plan leaves free, for blocks loaded beside it.
        held_besides: bytes of the budget that the plan sets aside for other things than weights.
    """

    def __init__(self, channel: Channel, ledger: Ledger, private: Callable[[int], Any] = Slab) -> None:
        self.channel = channel
        self._ledger = ledger
        self._private = private
        self._slab: Any = None
        self.room_off_plan = 0
        self.held_besides = 0

    def use(self, slab: Any, room_off_plan: int) -> None:
        """Blocks have their places in ``slab`` from now on."""
        self._slab = slab
        # Two percent, or a mebibyte: rounding must not refuse what the plan's author would have allowed.
        self.room_off_plan = room_off_plan + max(1 << 20, slab.nbytes // 50)

    def put_in(self, block: BlockState, *, show: bool = True) -> None:
        """A block is in: have views of its place, and let the model see them.

        They are made when it is first used, so that a change of plan need not wait for all of them.
        """
        if not block.bound:
            self._rebind(block)
        if show:
            block.show()

    def submit(self, block: BlockState, *, urgent: bool = False) -> None:
        """Start reading a block whose place is free."""
        slab, extents = self._slab, block.extents
        if block.private is not None:
            slab = block.private
            base = min(e.target for e in extents)
            extents = [Extent(e.file, e.offset, e.nbytes, e.target - base) for e in extents]
        assert slab is not None
        block.job = self.channel.submit(block, slab, extents, urgent=urgent)
        block.state = State.READING

    def finish(self, block: BlockState) -> None:
        """Wait until a block that is being read is in. Raises the read's error if it fails twice."""
        for last_try in (False, True):
            job = block.job
            assert job is not None
            try:
                self.channel.wait(job)
            except BaseException as error:
                if job.done:
                    block.state, block.job = State.OUT, None
                # A read that failed ahead of time may have met a trouble that is over: try once more, now.
                if last_try or not isinstance(error, StorageError) or not job.done:
                    raise
                self.submit(block, urgent=True)
            else:
                block.state, block.ready, block.job = State.IN, job.ready, None
                return

    @staticmethod
    def settle(block: BlockState) -> None:
        """Note the outcome of a read that has ended, without waiting or raising."""
        if block.state is State.READING and block.job is not None and block.job.done:
            block.state = State.OUT if block.job.error is not None else State.IN
            block.ready, block.job = block.job.ready, None

    def evict(self, block: BlockState) -> None:
        """Put stand-ins where the block's weights were; bytes that others kept are moved aside first.

        Raises:
            StreamedModelError: a weight was written to while it was in; the block is out all the same.
        """
        if block.state is State.OUT:
            return
        block.state, block.job = State.OUT, None
        if block.ready is not None:
            self.channel.give_up(block)
        written = ""
        block.shown = False
        # Shown or not: an operator that met a stand-in may have made a view.
        for weight in block.weights if block.bound else ():
            kept = False
            for slot in weight.slots:
                written = written or (weight.name if slot.written else "")
                kept = slot.take_out() or kept
                slot.renew_standin()
            if kept:
                self._rescue(block, weight)
        if block.private is not None:
            self._ledger.add("off_plan", -block.nbytes)
            forget_views(block)
            block.private.close()
            block.private = None
            self._rebind(block)
        if written:
            raise StreamedModelError(
                f"weight {written!r} was modified in place while streamed; the change is lost, because weights are "
                "read from their file: call model.eval() if this is a normalisation layer"
            )

    def give_private(self, block: BlockState) -> None:
        """Give a block memory of its own, because its place is in use or it has none.

        Raises:
            BudgetError: the budget has no room beside the plan.
        """
        if block.nbytes > self.room_off_plan:
            raise BudgetError(
                f"{block.name} ({format_bytes(block.nbytes)}) is used outside the traced order while its place in "
                "memory is in use, and the budget has no room beside the plan: raise the budget by that much, or "
                "pass example inputs that take this path",
                minimum=self.held_besides + self._ledger.total + block.nbytes,
                limiter=block.name,
            )
        block.private = self._private(block.nbytes)
        self._ledger.add("off_plan", block.nbytes)
        self._rebind(block)

    def _rebind(self, block: BlockState) -> None:
        slab, base = self._place(block)
        if slab is not None and base is not None:
            block.bind(slab, base)

    def _place(self, block: BlockState) -> tuple[Any, int | None]:
        return (block.private, 0) if block.private is not None else (self._slab, block.offset)

    def _rescue(self, block: BlockState, weight: Weight) -> None:
        slab, base = self._place(block)
        place = block.places[block.weights.index(weight)]
        for slot in weight.slots:
            if slot.kept:
                self._ledger.add("escaped", slot.rescue())
            if slab is not None and base is not None:
                slot.bind(slab.tensor(base + place, weight.entry.dtype, weight.entry.shape))


def forget_views(block: BlockState) -> None:
    """Let go of the views of a block that is out."""
    block.bound = False
    for weight in block.weights:
        for slot in weight.slots:
            slot.unbind()
