"""The dynamic programme: least seconds of every stretch of the chain for every number of memory slots.

``Opt(s, t, m)`` is the least time of forward and backward of units s to t, with ``B_s`` held outside of the m slots
and the gradient of unit t + 1 alive in them until the backward of t. Either unit s is kept, and ``Opt(s + 1, t)``
has what that leaves; or units s to j - 1 run without saving, ``Opt(j, t)`` has what ``B_j`` leaves, and
``Opt(s, j - 1)`` follows with all of m: the persistent schedules of Beaumont et al. (``chain.py`` has the source).

The first pass is apart from the replays: it always goes to the end of the chain, it alone writes to storage, and its
seconds are those of a forward. A segment of it, or a unit whose savings are on storage, may have its inputs on storage
if nothing else holds them, which is known from the item before: a unit that is kept in memory holds its outputs, one
on storage or a segment does not. What is shared with the last boundary that is in memory is not released, so that
boundary is part of the state.

Bytes are rounded up to slots. All budgets are worked out at once, as one axis of the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from narrowboat.plan.recompute.chain import Chain, IntArray, Option, Unit
from narrowboat.plan.recompute.schedule import Item, Kept, Segment

FloatArray = npt.NDArray[np.float64]
_Bytes = TypeVar("_Bytes", int, IntArray)


@dataclass(frozen=True, slots=True, eq=False)
class _Move:
    """A way to begin a stretch ``[s, t]``, for n values of t at once.

    Attributes:
        item: what is done; the inside of a segment is filled in when a schedule is read off.
        seconds: what the item takes, but for a replay of a segment.
        first: the first t.
        low: slots that it needs, shape (n,) or (1,).
        shift: slots that it holds from the rest; below 0 where it frees some.
        rest: seconds of the rest of the stretch, shape (n, slots + 1).
        again: seconds of the segment's replay, shape (slots + 1,).
        inputs: the last boundary in memory after it, None where it needs its outputs itself.
    """

    item: Item
    seconds: float
    first: int
    low: IntArray
    shift: int
    rest: FloatArray
    again: FloatArray | None = None
    inputs: int | None = None

    def improve(self, best: FloatArray) -> None:
        """Lower ``best``, shape (n, slots + 1), wherever this is faster."""
        top = best.shape[1]
        start = max(self.shift, int(self.low.min()), 0)
        if start >= top:
            return
        full = min(top, top + self.shift)  # a shift below 0 would read on past the end: there the last one stands
        found = np.empty((len(self.rest), top - start))
        found[:, : max(full - start, 0)] = self.rest[:, start - self.shift : top - max(self.shift, 0)]
        found[:, max(full - start, 0) :] = self.rest[:, -1:]
        found += self.seconds
        if self.again is not None:
            found += self.again[start:]
        if self.low.max() > start:
            found[np.arange(start, top) < self.low[:, None]] = np.inf
        np.minimum(best[:, start:], found, out=best[:, start:])

    def at(self, last: int, slots: int) -> float:
        """Seconds for one t and one number of slots; infinite where it cannot be."""
        row = last - self.first
        if not 0 <= row < len(self.rest) or slots < max(self.shift, int(self.low[row])):
            return math.inf
        again = 0.0 if self.again is None else float(self.again[slots])
        return self.seconds + again + float(self.rest[row, self.after(slots)])

    def after(self, slots: int) -> int:
        """Slots left for the rest."""
        return min(slots - self.shift, int(self.rest.shape[1]) - 1)


class Programme:
    """Least seconds for 0 to ``slots`` slots of ``slot`` bytes, and the schedules that take them.

    Args:
        chain: L units.
        slot: bytes of a slot.
        slots: the most slots; O(L^3 slots) seconds and O(L^2 slots) bytes.
        segments: whether units may be dropped and run again.
    """

    def __init__(self, chain: Chain, slot: int, slots: int, *, segments: bool = True) -> None:
        self._chain, self._slot, self._width, self._segments = chain, slot, slots + 1, segments
        count = len(chain.units)
        self._waiting = np.array([chain.gradient_after(unit) for unit in range(count)], dtype=np.int64)
        self._done = np.zeros((1, self._width))  # nothing left to do
        # _replays[s][t - s]: a replay of s to t; it never comes to the last unit, which every first pass keeps
        replayed = range(count - 1 if segments else 0)
        self._replays = [np.full((count - 1 - unit, self._width), np.inf) for unit in replayed]
        for unit in reversed(replayed):
            for move in self._replay_moves(unit):
                begin = move.first - unit
                move.improve(self._replays[unit][begin : begin + len(move.rest)])
        # _firsts[s]: the first pass from s on; _after[s][p]: the same where nothing else needs B_s, and B_p is the
        # last boundary in memory
        self._firsts = np.full((count, self._width), np.inf)
        self._after: list[FloatArray] = [self._done] * count
        for unit in reversed(range(count)):
            for move in self._first_moves(unit):
                move.improve(self._firsts[unit : unit + 1])
            if chain.has_storage:
                self._after[unit] = np.repeat(self._firsts[unit : unit + 1], unit, axis=0)
                for rows, move in self._storage_moves(unit, range(unit)):
                    move.improve(self._after[unit][rows])

    @property
    def seconds(self) -> FloatArray:
        """Least seconds of the whole chain by slots, shape (slots + 1,); infinite where there is no schedule."""
        seconds: FloatArray = self._firsts[0]
        return seconds

    def schedule(self, slots: int) -> tuple[Item, ...]:
        """The items of a schedule that takes ``seconds[slots]``, which must be finite."""
        items: list[Item] = []
        here, inputs, last = 0, None, len(self._chain.units) - 1
        while here <= last:
            moves = list(self._first_moves(here))
            if inputs is not None and self._chain.has_storage:
                moves += [move for _, move in self._storage_moves(here, range(inputs, inputs + 1))]
            here, slots, inputs = self._take(moves, last, slots, items)
        return tuple(items)

    def _replay(self, here: int, last: int, slots: int) -> tuple[Item, ...]:
        items: list[Item] = []
        while here <= last:
            here, slots, _ = self._take(list(self._replay_moves(here)), last, slots, items)
        return tuple(items)

    def _take(self, moves: list[_Move], last: int, slots: int, items: list[Item]) -> tuple[int, int, int | None]:
        """Append the fastest move; the unit after it, the slots left, and the last boundary in memory."""
        move = min(moves, key=lambda candidate: candidate.at(last, slots))
        item = move.item
        if isinstance(item, Segment):
            item = replace(item, inside=self._replay(item.start, item.stop - 1, slots))
        items.append(item)
        return item.stop, move.after(slots), move.inputs

    def _replay_moves(self, start: int) -> Iterator[_Move]:
        """What a replay can do at a unit; a segment's own replay must be worked out when its move is asked for."""
        unit = self._chain.units[start]
        waiting = self._waiting[start:-1]
        for number, option in enumerate(unit.options):
            if option.spilled:
                continue
            seconds = unit.replay + option.forward_extra + unit.backward + option.backward_extra
            low = np.maximum(self._slots(option.forward_peak + waiting), self._slots(option.backward_peak))
            kept = Kept(start, number)
            yield _Move(kept, seconds, start, low[:1], 0, self._done)
            if len(waiting) > 1:
                yield _Move(kept, seconds, start + 1, low[1:], self._slots(option.held), self._replays[start + 1])
        seconds, peak = 0.0, 0
        for stop in range(start + 1, len(self._chain.units) - 1):
            seconds += self._chain.units[stop - 1].replay
            peak = max(peak, self._chain.carry(start, stop - 1) + self._chain.units[stop - 1].dropped_peak)
            low = self._slots(peak + self._waiting[stop:-1])
            shift = self._slots(self._chain.carry(start, stop))
            again = self._replays[start][stop - 1 - start]
            yield _Move(Segment(start, stop, ()), seconds, stop, low, shift, self._replays[stop], again)

    def _first_moves(self, start: int) -> Iterator[_Move]:
        """What the first pass can do at a unit, whatever came before."""
        unit = self._chain.units[start]
        end = len(self._chain.units) - 1
        for number, option in enumerate(unit.options):
            seconds, low = self._keeping(unit, option)
            if start == end:
                yield _Move(Kept(start, number), seconds, end, low, 0, self._done)
                continue
            inputs = start if option.spilled else None
            rest = self._rest(start + 1, inputs)
            yield _Move(Kept(start, number), seconds, end, low, self._slots(option.held), rest, None, inputs)
        for stop, seconds, low in self._dropping(start):
            shift = self._slots(self._chain.carry(start, stop))
            again = self._replays[start][stop - 1 - start]
            yield _Move(Segment(start, stop, ()), seconds, end, low, shift, self._rest(stop, start), again, start)

    def _storage_moves(self, start: int, befores: range) -> Iterator[tuple[slice, _Move]]:
        """What it can do besides where nothing else needs the unit's inputs.

        Comes with the rows of ``_after`` that a move is for: those last boundaries in memory, out of ``befores``,
        that share as much with the inputs. Releasing nothing can pay too: what the next boundary shares with the
        inputs can then leave with it.
        """
        chain, end = self._chain, len(self._chain.units) - 1
        unit = chain.units[start]
        for number, option in enumerate(unit.options):
            if not option.spilled or start == end:
                continue
            seconds, low = self._keeping(unit, option)
            kept = Kept(start, number, spilled=True)
            for rows, released in self._releases(befores, start, start + 1):
                rest = self._after[start + 1][rows]
                shift = self._slots(option.held - released)
                yield rows, _Move(kept, seconds, end, low, shift, rest, None, rows.start)
        for stop, seconds, low in self._dropping(start):
            again = self._replays[start][stop - 1 - start]
            item = Segment(start, stop, (), spilled=True)
            for rows, released in self._releases(befores, start, stop):
                rest = self._after[stop][rows]
                shift = self._slots(chain.carry(start, stop) - released)
                total = seconds + released * chain.transfer
                yield rows, _Move(item, total, end, low, shift, rest, again, rows.start)

    def _releases(self, befores: range, start: int, stop: int) -> Iterator[tuple[slice, int]]:
        """The bytes of ``B_start`` that can leave memory, by runs of last boundaries in memory."""
        for released, group in groupby(befores, key=partial(self._chain.released, start=start, stop=stop)):
            inputs = list(group)
            yield slice(inputs[0], inputs[-1] + 1), released

    def _rest(self, start: int, inputs: int | None) -> FloatArray:
        """Seconds of the first pass from a unit on, ``B_inputs`` being the last boundary in memory if nobody else
        needs the unit's own; shape (1, slots + 1)."""
        if inputs is None or not self._chain.has_storage:
            return self._firsts[start : start + 1]
        return self._after[start][inputs : inputs + 1]

    def _keeping(self, unit: Unit, option: Option) -> tuple[float, IntArray]:
        """The seconds of a unit in the first pass and its backward, and the slots that it needs."""
        seconds = unit.forward + option.forward_extra + unit.backward + option.backward_extra
        return seconds, self._at_least(max(option.forward_peak, option.backward_peak))

    def _dropping(self, start: int) -> Iterator[tuple[int, float, IntArray]]:
        """Where a segment of the first pass can stop, the seconds of its forward, and the slots that it needs."""
        seconds, peak = 0.0, 0
        for stop in range(start + 1, len(self._chain.units) if self._segments else 0):
            unit = self._chain.units[stop - 1]
            seconds += unit.forward
            peak = max(peak, self._chain.carry(start, stop - 1) + unit.dropped_peak)
            yield stop, seconds, self._at_least(peak)

    def _at_least(self, nbytes: int) -> IntArray:
        return np.array([self._slots(nbytes)], dtype=np.int64)

    def _slots(self, nbytes: _Bytes) -> _Bytes:
        """Bytes in slots, rounded up."""
        return -(-nbytes // self._slot)
