"""Experts on demand: a cache of a fixed number of bytes, at the addresses where the whole stacks would lie.

Each stack has addresses for all of its experts, and memory only behind those that are in. So an operator is given the
very operand that plain PyTorch gives it, at any time, and an expert has one address for ever: coming in is one read to
where the kernel reads it, going is giving its pages back. What an operator must not read is never read by it: it is
told apart by the operator (``stream.expert_ops``), which asks here for the experts it will touch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from narrowboat.arena.ledger import Ledger
from narrowboat.arena.slab import Slab
from narrowboat.arena.slot import Weight
from narrowboat.errors import StorageError, StreamedModelError
from narrowboat.plan.experts import Policy
from narrowboat.profile.experts import Experts, Stack
from narrowboat.stream.blocks import State
from narrowboat.stream.expert_cells import Cause, Cell, ExpertCounts, joined, lay_out, neighbours, runs
from narrowboat.stream.forecast import Forecast
from narrowboat.stream.reader import Reader
from narrowboat.stream.routing import Routing

_TOGETHER = 1 << 20  # bytes of neighbouring small experts that are read in one piece
_WINDOW = 4 << 20  # bytes on their way while others compute, whoever has to leave for them
_WHOEVER = None
_LOOK_EVERY = 0.5  # seconds over which it is measured how busy storage is
_storage_uses = torch._C._storage_Use_Count


class ExpertCache:
    """Brings experts in as operators need them. Used by one thread at a time, under the engine's lock.

    Args:
        experts: the stacks.
        weights: all weights of the model, by number.
        reader: brings bytes in.
        file_number: the reader's number of each weights file, by path.
        packed: the file's tensors begin at page boundaries.
        ledger: who holds how many bytes.
        waited: told of each wait: what for, and from when to when.
        forecast: foresees what the next stack will want.
        lock: keep what is in from being swapped out.

    Attributes:
        capacity: bytes that may be in.
        held: bytes that are in, or on their way.
        most: the most there ever were since the capacity was set.
        counts: what it did.
    """

    def __init__(
        self,
        experts: Experts,
        weights: Sequence[Weight],
        reader: Reader,
        file_number: dict[str, int],
        *,
        packed: bool,
        ledger: Ledger,
        waited: Callable[[str, float, float], None],
        forecast: Forecast,
        lock: bool = False,
    ) -> None:
        self._reader = reader
        self._ledger = ledger
        self._waited = waited
        self._forecast = forecast
        self._lock = lock
        self.stacks = experts.stacks
        self.capacity = 0
        self.held = 0
        self.most = 0
        self.counts = ExpertCounts()
        self._stack_of: dict[int, Stack] = {w: stack for stack in self.stacks for w in stack.weights}
        self._cells, self._first, self._base, nbytes = lay_out(self.stacks, weights, file_number, packed)
        self._coming: set[int] = set()  # keys of those being read
        self._whole: dict[int, tuple[torch.Tensor, Any]] = {}
        self._looked = 0.0, 0.0  # when it was, and for how long storage had been busy by then
        self._busy = 1.0
        self._routing = Routing({cell.key: cell.nbytes for cell in self._cells})
        self._slab = Slab(nbytes, lock=lock, populate=False)
        self._slab.small_pages()

    @property
    def policy(self) -> Policy:
        """Who leaves first."""
        return self._routing.policy

    # -- what operators ask for ----------------------------------------------------------------------

    def portions(self, weight: Weight, wanted: Sequence[int]) -> Iterator[list[int]]:
        """Bring the experts ``wanted`` of ``weight`` in; yield them as they come, each once.

        Those yielded are in until the next are asked for. Those that are in come first, so that they compute while
        others are read; if all are in, they come all at once.

        Raises:
            StorageError, WeightsChangedError: a read failed, twice.
        """
        cells = [self._cell(weight, e) for e in wanted]
        self._judge(weight, wanted)
        self._note(cells)
        left = cells
        while left:
            self._ask(left, {cell.key for cell in left})
            self._ahead(weight, wanted, left)
            ready = [cell for cell in left if self._settled(cell)]
            if not ready:
                self._wait(left[0])
                ready = [left[0]]
            yield [cell.expert for cell in ready]
            left = [cell for cell in left if cell not in ready]

    def together(self, weight: Weight) -> bool:
        """Bring all experts of ``weight`` in at once; False if the cache cannot hold them."""
        cells = [self._cell(weight, e) for e in range(weight.entry.shape[0])]
        if sum(cell.nbytes for cell in cells) > self.capacity:
            return False
        keys = {cell.key for cell in cells}
        while not all(self._settled(cell) for cell in cells):
            for cell in cells:
                self._ask([cell], keys)
                self._wait(cell)
        return True

    def whole(self, weight: Weight) -> torch.Tensor:
        """The whole weight at its place, whether its experts are in or not; reading one that is out gives zeros."""
        found = self._whole.get(weight.index)
        if found is None or found[0].requires_grad != _flag(weight):
            found = self._whole[weight.index] = self._view(weight, self._base[weight.index], weight.entry.shape)
        return found[0]

    def row(self, weight: Weight, expert: int) -> torch.Tensor:
        """One expert that is in, as a tensor of one row; views of it keep its bytes."""
        cell = self._cell(weight, expert)
        if cell.lease is None:
            row = weight.entry.nbytes // weight.entry.shape[0]
            shape = (1, *weight.entry.shape[1:])
            cell.lease = self._view(weight, self._base[weight.index] + expert * row, shape)
        return cell.lease[0]

    def _view(self, weight: Weight, at: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
        view = self._slab.tensor(at, weight.entry.dtype, shape)
        if isinstance(weight.slots[0].tensor, nn.Parameter):  # kernels choose their path by the flag
            with torch.inference_mode(False):
                view = nn.Parameter(view, requires_grad=_flag(weight))
        return view, view.untyped_storage()

    # -- coming in -----------------------------------------------------------------------------------

    def _cell(self, weight: Weight, expert: int) -> Cell:
        return self._cells[self._first[weight.index] + expert]

    def _ask(
        self,
        cells: Sequence[Cell],
        kept: set[int],
        ahead: Mapping[int, int | None] | None = None,
        cause: Cause = Cause.ASKED,
    ) -> None:
        """Have as many of ``cells`` read as there is room for without any of ``kept`` leaving.

        Others leave for them if they rank lower; but some are read while others compute, whoever must go.

        Args:
            cells: in the order they are wanted.
            kept: keys that stay.
            ahead: nobody waits for them; by key, the key as whose equals they rank.
            cause: why they are read.
        """
        asked: list[Cell] = []
        window = min(_WINDOW, self.capacity // 4)
        coming = sum(cell.nbytes for cell in cells if cell.state is not State.OUT)
        try:
            for cell in cells:
                if cell.state is not State.OUT:
                    continue
                force = ahead.get(cell.key) if ahead is not None else _WHOEVER if coming < window else cell.key
                if not self._make_room(cell, kept, must=ahead is None and coming == 0, below=force):
                    break
                cell.state, cell.cause = State.READING, cause
                self._coming.add(cell.key)
                self._count(cell.nbytes)
                coming += cell.nbytes
                asked.append(cell)
            pieces = runs(asked, _TOGETHER)
            # Urgent reads go to the head of the queue one by one: the last to be asked for is the first to be read.
            for run in pieces if ahead is not None else reversed(pieces):
                self._read(run, urgent=ahead is None)
        except BaseException:
            for cell in asked:
                if cell.job is None and cell.state is State.READING:
                    self._forget(cell)
            raise

    def _read(self, run: list[Cell], *, urgent: bool) -> None:
        if self._lock:
            self._slab.hold([(cell.low, cell.nbytes) for cell in run])
        job = self._reader.submit(run[0].weight.name, self._slab, joined(run), urgent=urgent)
        self.counts.bytes_read += job.nbytes
        self.counts.bytes_ahead += sum(cell.nbytes for cell in run if cell.cause is Cause.FORESEEN)
        for cell in run:
            cell.job = job

    def _settled(self, cell: Cell) -> bool:
        """Whether the cell is in; notes the outcome of a read that has ended."""
        if cell.state is State.READING and cell.job is not None and cell.job.done:
            if cell.job.error is not None:
                self._forget(cell)
            else:
                self._arrived(cell)
        return cell.state is State.IN

    def _arrived(self, cell: Cell) -> None:
        cell.state, cell.job = State.IN, None
        self._coming.discard(cell.key)
        self._routing.ranking.add(cell.key)

    def _settle(self) -> bool:
        """Note the outcome of all reads that have ended; whether there were any."""
        before = len(self._coming)
        for key in list(self._coming):
            self._settled(self._cells[key])
        return len(self._coming) < before

    def _wait(self, cell: Cell) -> None:
        """Return with the cell in. Raises the read's error if it fails twice."""
        for last_try in (False, True):
            if self._settled(cell):
                return
            if cell.state is State.OUT:
                self._ask([cell], {cell.key})
            job = cell.job
            assert job is not None
            before = time.perf_counter()
            try:
                self._reader.wait(job)
            except BaseException as error:
                if job.done:
                    self._forget(cell)
                # A read that failed ahead of time may have met a trouble that is over: try once more, now.
                if last_try or not isinstance(error, StorageError) or not job.done:
                    raise
            finally:
                self._waited(cell.weight.name, before, time.perf_counter())
        self._settled(cell)

    # -- going ---------------------------------------------------------------------------------------

    def _make_room(self, cell: Cell, kept: set[int], *, must: bool, below: int | None) -> bool:
        """Let others go until there is room for ``cell``; False if those who may are not enough.

        Args:
            cell: who comes in.
            kept: keys that stay.
            must: wait for reads under way, and move bytes aside that somebody keeps a view of.
            below: only who ranks below this key leaves; anybody for ``_WHOEVER``.
        """
        held_on: set[int] = set()
        while self.held + cell.nbytes > self.capacity:
            key = self._routing.ranking.leaving(_Either(kept, held_on), below)
            if key is not None:
                other = self._cells[key]
                if self._in_use(other):
                    held_on.add(key)
                else:
                    self._evict(other)
                continue
            if self._settle():  # what came in unasked for may go as well
                continue
            if not must:
                return False
            if self._coming - kept:
                self._reader.drain()
                self._settle()
            elif held_on:
                self._rescue(self._cells[held_on.pop()])
            else:
                break  # alone, and the budget has no less room than one expert takes
        return True

    def _in_use(self, cell: Cell) -> bool:
        """Whether somebody keeps a view of its bytes."""
        leases = (cell.lease, self._whole.get(cell.weight.index))
        # The storage is referred to by our tensor and by our reference to it.
        return any(lease is not None and _storage_uses(lease[1]._cdata) > 2 for lease in leases)

    def _rescue(self, cell: Cell) -> None:
        """Move bytes that others keep a view of into memory of their own."""
        for lease in (cell.lease, self._whole.pop(cell.weight.index, None)):
            if lease is not None and _storage_uses(lease[1]._cdata) > 2:
                with torch.inference_mode(False):
                    lease[1]._swap_data_ptr_(lease[1].clone())
                self._ledger.add("escaped", lease[1].nbytes())
        cell.lease = None

    def _evict(self, cell: Cell) -> None:
        """Let a cell go that nobody keeps a view of.

        Raises:
            StreamedModelError: an expert of its weight was written to; all of them are out then.
        """
        weight = cell.weight
        # A view that an operator took counts its writes at the stand-in it was asked of.
        if not any(slot.tensor._version for slot in weight.slots):
            cell.lease = None
            self._forget(cell)
            return
        for slot in weight.slots:
            slot.renew_standin()
        first = self._first[weight.index]
        for other in self._cells[first : first + weight.entry.shape[0]]:
            if other.state is State.IN:
                if self._in_use(other):
                    self._rescue(other)
                other.lease = None
                self._forget(other)
        raise StreamedModelError(
            f"weight {weight.name!r} was modified in place while streamed; the change is lost, because weights are "
            "read from their file"
        )

    def _forget(self, cell: Cell) -> None:
        """The cell's bytes are not in, or not to be trusted; its pages go back."""
        self._routing.ranking.remove(cell.key)
        self._coming.discard(cell.key)
        cell.state, cell.job = State.OUT, None
        self._count(-cell.nbytes)
        low, high = cell.low, cell.high
        for other in neighbours(self._cells, cell):
            if other.state is not State.OUT:  # a page that both have bytes on stays
                low, high = (max(low, other.high), high) if other.key < cell.key else (low, min(high, other.low))
        if high > low:
            self._slab.release([(low, high - low)])

    def _count(self, nbytes: int) -> None:
        self.held += nbytes
        self.most = max(self.most, self.held)
        self._ledger.set("experts", self.held)

    # -- who is used, and who will be ------------------------------------------------------------------

    def _note(self, cells: Sequence[Cell]) -> None:
        counts = self.counts
        for cell in cells:
            self._settled(cell)
            if cell.state is State.OUT or cell.cause is Cause.SIBLING:
                counts.misses += 1
            else:
                counts.hits += 1
                counts.bytes_foreseen += cell.nbytes if cell.cause is Cause.FORESEEN else 0
            cell.cause = Cause.ASKED
            self._routing.use(cell.key)
        if self._routing.due:
            counts.shares = self._routing.choose(
                self.capacity, [cell.key for cell in self._cells if cell.state is State.IN]
            )

    def _ahead(self, weight: Weight, wanted: Sequence[int], left: Sequence[Cell]) -> None:
        """Have the same experts' rows of the module's later weights read: they are wanted for certain."""
        stack = self._stack_of[weight.index]
        later = stack.weights[stack.weights.index(weight.index) + 1 :]
        if not later or any(cell.state is State.OUT for cell in left):
            return
        cells = [self._cells[self._first[w] + e] for w in later for e in wanted]
        if all(cell.state is not State.OUT for cell in cells):
            return
        mine = self._first[weight.index]
        kept = {cell.key for cell in (*left, *cells)}
        self._ask(cells, kept, {cell.key: mine + cell.expert for cell in cells}, Cause.SIBLING)

    def foresee(self, weight: Weight, wanted: Sequence[int], rows: torch.Tensor) -> None:
        """Have the experts read that the next stack is likely to want, if forecasts of it have come true.

        Args:
            weight: of the stack that computes; only its first weight is asked about.
            wanted: the experts it uses.
            rows: what it computes on, [copies of one token's state, width].
        """
        stack = self._stack_of[weight.index]
        following = self.stacks.index(stack) + 1
        if weight.index != stack.weights[0] or following >= len(self.stacks):
            return
        likely = self._forecast.look(following, rows, len(wanted))
        first = self._first[self.stacks[following].weights[0]]
        out = [e for e in likely if self._cells[first + e].state is State.OUT]
        if self._forecast.expect(following, out, self._busy, len(wanted) / stack.count) and out:
            cells = [self._cells[self._first[w] + e] for w in self.stacks[following].weights for e in out]
            present = {self._first[w] + e for w in stack.weights for e in wanted}
            kept = present | {self._first[w] + e for w in self.stacks[following].weights for e in likely}
            self._ask(cells, kept, {cell.key: _WHOEVER for cell in cells}, Cause.FORESEEN)

    def _judge(self, weight: Weight, wanted: Sequence[int]) -> None:
        stack = self._stack_of[weight.index]
        if weight.index == stack.weights[0]:
            self._forecast.judge(self.stacks.index(stack), wanted)
            now, busy = time.perf_counter(), self._reader.busy()
            if now - self._looked[0] > _LOOK_EVERY:
                self._busy = (busy - self._looked[1]) / (now - self._looked[0])
                self._looked = now, busy

    # -- the session -----------------------------------------------------------------------------------

    def resize(self, capacity: int) -> None:
        """Hold no more than ``capacity`` bytes from now on. No operator may be in progress.

        Raises:
            StreamedModelError: an expert that had to go was written to.
        """
        self.capacity = capacity
        if self.held > capacity:
            self._reader.drain()
            self._settle()
        while self.held > capacity:
            key = self._routing.ranking.leaving(())
            if key is None:
                break
            if self._in_use(self._cells[key]):
                self._rescue(self._cells[key])
            self._evict(self._cells[key])
        self.most = self.held

    def reset(self) -> None:
        """Forget what is in, after an interruption; the reads have ended."""
        for cell in self._cells:
            if self._in_use(cell):
                self._rescue(cell)
            cell.lease = None
            if cell.state is not State.OUT:
                self._forget(cell)
        self.held = 0
        self._ledger.set("experts", 0)

    def close(self) -> None:
        """Give the memory back."""
        self.reset()
        self._whole.clear()
        self._slab.close()


def _flag(weight: Weight) -> bool:
    return weight.slots[0].tensor.requires_grad


class _Either:
    """Whether a key is in one of two sets."""

    def __init__(self, first: set[int], second: set[int]) -> None:
        self._sets = first, second

    def __contains__(self, key: object) -> bool:
        return key in self._sets[0] or key in self._sets[1]
