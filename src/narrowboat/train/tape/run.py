"""One forward pass under a plan: what autograd saves is kept, compacted, spilled or dropped, and brought back in time.

The pass runs under a dispatch mode that numbers operators and storages in the order of the measured tape. Saved
tensors come through ``saved_tensors_hooks``. A dropped one is computed again from the operators as they were called,
below autograd: no Python of the model runs twice, so buffers, random streams, hooks and attributes of modules move
once, as in the plain step.

[Note: identity] Storages are recognised, not tensors: views, ``detach`` and in-place operators make new tensors over
the same storage, and autograd saves yet others. A plan allows no frame to begin between a storage's creation and its
last change, so the storage that a frame holds has the values that its replay needs.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from narrowboat.errors import ReplayError
from narrowboat.train.tape.cells import Cell, Held, Kept, Place, Pool
from narrowboat.train.tape.encoded import EncodedOp, Outside, encode, ref_to
from narrowboat.train.tape.facts import OpFacts, facts_of
from narrowboat.train.tape.frames import NOTHING, Frame, StepPlan, Takes, Treatment
from narrowboat.train.tape.leaves import plain, tensors_in, written_tensors
from narrowboat.train.tape.renormal import shorten
from narrowboat.train.tape.storages import StorageNumbers
from narrowboat.train.tape.structure import Signature

log = logging.getLogger("narrowboat")
_AHEAD = 4  # storages read before they are asked for; the pool bounds their bytes


class _OpenFrame:
    """A frame that waits for its replay, with what it holds."""

    __slots__ = ("_held", "_places", "plan")

    def __init__(self, plan: Frame) -> None:
        self.plan = plan
        self._held: dict[int, torch.UntypedStorage] = {}
        self._places: dict[int, Place] = {}

    def hold(self, number: int, storage: torch.UntypedStorage) -> None:
        """Keep a storage that the replay begins with."""
        self._held[number] = storage

    def spill(self, pool: Pool, places: MutableMapping[int, Place]) -> None:
        """Send what is held to storage; nothing changes it any more."""
        for number, storage in self._held.items():
            place = places.get(number) or Place(pool, storage)
            places[number] = self._places[number] = place
        self._held.clear()

    def take(self) -> dict[int, torch.UntypedStorage]:
        """What was held, which is held no more."""
        held, self._held = self._held, {}
        for number, place in self._places.items():
            held[number] = place.pool.read(place.ticket)
        self._places = {}
        return held

    def part_from(self, number: int) -> None:
        """Hold a copy of this storage, if it is held: it is about to be written to, against the plan."""
        if number in self._places:
            place = self._places.pop(number)
            self._held[number] = place.pool.read(place.ticket)
        if number in self._held:
            self._held[number] = self._held[number].clone()

    def drop(self) -> None:
        """Let go of everything."""
        self._held.clear()
        self._places.clear()


class TapeRun(TorchDispatchMode):
    """The tape of one forward pass.

    Args:
        plan: what to do with each saved storage.
        pool: where spilled storages go; None if the plan spills nothing.
        before: told what is about to be taken, before each operator and each saved tensor.
        check: note what everything was, and compare what replays bring back with that, bit by bit.

    Attributes:
        departed: the operator (index, its name, the name expected) at which the pass left the plan; None if it did
            not. What autograd saves from there on is kept.
        replays: frames that were replayed.
        wrong: numbers of storages that a replay brought back with other bits (with ``check``).
    """

    def __init__(
        self,
        plan: StepPlan,
        pool: Pool | None = None,
        *,
        before: Callable[[Takes], None] | None = None,
        check: bool = False,
    ) -> None:
        super().__init__()
        self._before = before
        self._plan = plan
        self._pool = pool
        self._check = check
        self._numbers = StorageNumbers()
        self._at = 0
        self._ops: dict[int, EncodedOp] = {}
        self._aliases: dict[int, list[Outside]] = {}  # what encoded operators read from outside, by storage address
        self._open = {
            index: _OpenFrame(plan.frames[index]) for index in dict.fromkeys(plan.frame_of_unit) if index >= 0
        }
        self._frame_of_unit = list(plan.frame_of_unit)
        self._spill_at: dict[int, list[_OpenFrame]] = {}
        for frame in self._open.values():
            if frame.plan.spilled and pool is not None:
                self._spill_at.setdefault(plan.cuts[frame.plan.start], []).append(frame)
        self._cells: weakref.WeakValueDictionary[tuple[int, int], Cell] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self._quiet = False  # the tape's own operators
        self._places: weakref.WeakValueDictionary[int, Place] = weakref.WeakValueDictionary()
        self._spilled: list[weakref.ref[Cell]] = []
        self.departed: tuple[int, str, str] | None = None
        self.replays = 0
        self.wrong: set[int] = set()
        self._running: EncodedOp | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The forward pass, the loss included, goes on inside."""
        with saved_tensors_hooks(self._pack, self._unpack), self:
            yield
        # What was numbered lives on in cells and frames; addresses may be used again from here on.
        self._numbers.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        facts = facts_of(func)
        if facts.view or self._quiet:
            return func(*args, **kwargs)
        if self.departed is not None:
            self._before_writes(facts, args, kwargs)
            return func(*args, **kwargs)
        at = self._at
        encoded = None
        if at in self._plan.encode:
            encoded = encode(func, facts, args, kwargs, self._numbers.get)
            for address, alias in encoded.outside:
                self._aliases.setdefault(address, []).append(alias)
        read = encoded.read if encoded is not None else None
        if facts.writes_named:
            read = self._before_writes(facts, args, kwargs)
        if self._before is not None and at < len(self._plan.takes):
            self._before(self._plan.takes[at])
        out = func(*args, **kwargs)
        results = (out,) if isinstance(out, torch.Tensor) else tuple(tensors_in(out))
        created = self._created(results, args, kwargs)
        if not created and not (facts.writes_named and self._writes(facts, args, kwargs)):
            return out
        if not self._follows(at, facts.name, len(created), read):
            return out
        self._at = at + 1
        if encoded is not None:
            encoded.created = tuple(created)
            if at in self._plan.lasting:
                shorten(encoded, facts, args, results)
            self._ops[at] = encoded
        for place, number in created:
            for index in self._plan.captures.get(number, ()):
                self._open[index].hold(number, results[place].untyped_storage())
        if self._spill_at and self._pool is not None:
            for frame in self._spill_at.get(at + 1, ()):
                frame.spill(self._pool, self._places)  # what was just made included
        return out

    def _created(self, results: tuple[torch.Tensor, ...], args: Any, kwargs: Any) -> list[tuple[int, int]]:
        """Storages that are neither known nor an argument's: their places among the results, and numbers for them."""
        created = []
        for place, tensor in enumerate(results):
            if not plain(tensor):
                continue
            storage = tensor.untyped_storage()
            if self._numbers.get(storage) is not None:
                continue
            if any(plain(given) and given.untyped_storage() is storage for given in tensors_in((args, kwargs))):
                continue  # an operator that gives its argument back
            created.append((place, self._numbers.add_inside(storage)))
        return created

    @staticmethod
    def _writes(facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return any(plain(tensor) for tensor in written_tensors(facts, args, kwargs))

    def _before_writes(self, facts: OpFacts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Bring what replays need into safety from what the operator is about to write; gives what it reads."""
        numbers = (self._numbers.get(each.untyped_storage()) for each in tensors_in((args, kwargs)) if plain(each))
        read = tuple(dict.fromkeys(number for number in numbers if number is not None))
        planned = self.departed is None and self._expected(self._at)[::2] == (facts.name, read)
        for tensor in written_tensors(facts, args, kwargs):
            if not plain(tensor):
                continue
            storage = tensor.untyped_storage()
            number = self._numbers.get(storage)
            if number is None:
                for alias in self._aliases.pop(storage._cdata, ()):
                    alias.part()
            elif not planned:
                # The plan holds storages only from their last change on; this is one more.
                for frame in self._open.values():
                    frame.part_from(number)
        return read

    @contextmanager
    def _own_operators(self) -> Iterator[None]:
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _expected(self, at: int) -> Signature:
        return self._plan.signature[at] if at < len(self._plan.signature) else ("the end", 0, ())

    def _follows(self, at: int, name: str, created: int, read: tuple[int, ...] | None) -> bool:
        """Whether the operator is the plan's next; ``read`` matters where it runs again or writes, else it is None."""
        expected = self._expected(at)
        if expected == (name, created, expected[2] if read is None else read):
            return True
        other = " of other tensors" if expected[0] == name else ""
        self.departed = (at, name + other, expected[0])
        log.info("the pass leaves its plan at operator %d: %s instead of %s", *self.departed)
        return False

    # -- what autograd saves -------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> Any:
        if not plain(tensor):
            return tensor if tensor.is_leaf else Kept(tensor)
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage)
        if number is None:
            return Kept(tensor)
        treatment, unit = Treatment.KEEP, -1
        if self.departed is None:
            treatment, unit = self._plan.treatments.get((number, self._at), (Treatment.KEEP, -1))
        takes = self._plan.needs.get((number, self._at), NOTHING)
        if treatment is Treatment.KEEP:
            return Kept(tensor, takes)
        cell = self._cells.get((number, unit))
        if cell is None:
            cell = Cell(number, unit, tensor.dtype)
            if treatment is Treatment.COMPACT:
                with self._own_operators():
                    cell.keep(storage, compacted=True)
            elif treatment is Treatment.SPILL and self._pool is None:
                cell.keep(storage)
            elif treatment is Treatment.SPILL and self._pool is not None:
                cell.place = self._places.get(number)
                if cell.place is None:
                    self._places[number] = cell.place = Place(self._pool, storage)
                self._spilled.append(weakref.ref(cell))
            self._cells[(number, unit)] = cell
        with self._own_operators():
            return Held(cell, ref_to(tensor, number), self, tensor, takes, check=self._check)

    def _unpack(self, packed: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            # Gradients are on in a backward pass only where it is itself to be differentiated.
            raise ReplayError(
                "a loss that differentiates through a backward pass (create_graph=True) needs the history of "
                "activations, which a plan does not keep: take such terms out of the budgeted step"
            )
        if isinstance(packed, (Kept, Held)):
            if self._before is not None and isinstance(packed, Held):
                restored = packed.cell.unpacked_bytes
                self._before(Takes(restored, restored))
            tensor = packed.unpack()
            if self._before is not None:
                self._before(packed.takes)
            return tensor
        return packed

    # -- having it back ------------------------------------------------------------------------------------------

    def bring(self, cell: Cell) -> None:
        """Run what has to run for the cell to be there. Raises ReplayError."""
        with self._lock:
            while not cell.here:
                index = self._frame_of_unit[cell.unit]
                frame = self._open.pop(index, None)
                if frame is None:
                    raise ReplayError(
                        f"storage {cell.number} of unit {cell.unit} was dropped and its replay did not bring it back; "
                        "a second backward pass over the same graph is not supported"
                    )
                self._replay(frame)
            self._read_ahead()

    def _read_ahead(self) -> None:
        # The backward pass asks for spilled storages in about the opposite order of their writing.
        while self._spilled:
            last = self._spilled[-1]()
            if last is not None and last.place is not None:
                break
            self._spilled.pop()
        for reference in reversed(self._spilled[-_AHEAD:]):
            waiting = reference()
            if waiting is not None and waiting.place is not None:
                waiting.place.prefetch()

    def _replay(self, frame: _OpenFrame) -> None:
        self.replays += 1
        plan = frame.plan
        there = frame.take()
        # Nothing here requires gradients, but some kernels ask whether they are on (recurrent layers' workspaces).
        with torch.enable_grad(), without_autocast():
            for index, frees in zip(plan.program.ops, plan.program.frees, strict=True):
                op = self._ops.get(index)
                if op is None:
                    break  # the pass left its plan before it came here
                if self._before is not None:
                    self._before(self._plan.takes[index])
                self._running = op
                for number, storage in op.run(there.__getitem__):
                    # What was held may have been changed since it was made; this is how it was before.
                    if number not in plan.program.inputs:
                        there[number] = storage
                for number in frees:
                    there.pop(number, None)
        for fill in plan.fills:
            cell_to_fill = self._cells.get((fill.number, fill.unit))
            if cell_to_fill is not None and not cell_to_fill.here and fill.number in there:
                cell_to_fill.keep(there[fill.number], compacted=fill.compact)
        for index in plan.inner:
            inner = _OpenFrame(self._plan.frames[index])
            for number in inner.plan.program.inputs:
                if number in there:
                    inner.hold(number, there[number])
            self._open[index] = inner
            for unit in range(inner.plan.start, inner.plan.stop):
                self._frame_of_unit[unit] = index

    def made_from(self, outside: Iterable[torch.Tensor]) -> set[int]:
        """Numbers of storages made by noted operators that read one of these tensors from outside."""
        addresses = {tensor.untyped_storage()._cdata for tensor in outside}
        readers = (op for op in self._ops.values() if any(address in addresses for address, _ in op.outside))
        return {number for op in readers for _, number in op.created}

    def touched_last(self) -> set[int]:
        """Numbers of what the operator replayed last reads and makes; after an error, of the one that failed."""
        op = self._running
        return {*op.read, *(number for _, number in op.created)} if op is not None else set()

    def close(self) -> None:
        """Let go of everything; the graph of this pass can no longer be used."""
        for frame in self._open.values():
            frame.drop()
        self._open.clear()
        self._ops.clear()
        self._running = None
        self._aliases.clear()
        for cell in list(self._cells.values()):
            cell.drop()


@contextmanager
def without_autocast() -> Iterator[None]:
    """Operators were noted below autocast: they must not be cast again."""
    with torch.autocast("cpu", enabled=False):
        if torch.cuda.is_available():
            with torch.autocast("cuda", enabled=False):
                yield
        else:
            yield
