"""A schedule for a tape, worked out in advance: what is held, what is dropped, and what runs to have it back.

A *frame* is a stretch of the tape that is replayed as a whole when the first of its saved storages is asked for. It
holds the storages that its replay begins with, and no others. A replay fills the saved storages of the units that
the schedule keeps at that level, and opens inner frames for the rest. Pure, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from narrowboat.plan.recompute import Kept, Segment
from narrowboat.train.tape.slices import Program, home, last_reads, program
from narrowboat.train.tape.structure import Signature, Tape, TapeOp


class Treatment(Enum):
    """What becomes of a saved storage until its backward comes."""

    KEEP = "keep"
    COMPACT = "compact"  # kept in fewer bytes, without loss
    SPILL = "spill"  # written to storage
    DROP = "drop"  # computed again


@dataclass(frozen=True, slots=True)
class UnitOption:
    """One option of one unit, as the tape understands it.

    Attributes:
        name: as in the chain's option ("keep", "reduced", ...).
        dropped: storages saved in the unit that are dropped and replayed from those that stay.
        compact: storages that are compacted.
        spilled: storages that are written out.
    """

    name: str
    dropped: frozenset[int] = frozenset()
    compact: frozenset[int] = frozenset()
    spilled: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Fill:
    """A saved storage that a replay brings back, for the unit that saved it."""

    number: int
    unit: int
    compact: bool = False


@dataclass(slots=True)
class Frame:
    """A stretch that is replayed as a whole.

    Attributes:
        index: its place among the plan's frames.
        start, stop: units.
        program: what runs; its ``inputs`` are what the frame holds.
        fills: saved storages that come back.
        inner: frames that its replay opens.
        spilled: what it holds is on storage until it runs.
    """

    index: int
    start: int
    stop: int
    program: Program
    fills: tuple[Fill, ...]
    inner: tuple[int, ...]
    spilled: bool = False


class Takes(NamedTuple):
    """Bytes that a kernel is about to take.

    Attributes:
        highest: the most at once.
        turnover: in all, what it gives back meanwhile included.
    """

    highest: int
    turnover: int


NOTHING = Takes(0, 0)


@dataclass(slots=True)
class StepPlan:
    """What the tape does with every saved storage of one pass.

    Attributes:
        signature: the operators for which it was made.
        treatments: for each saving (storage, operators run so far): what to do, and the unit it counts to.
        frames: all of them, inner ones included.
        frame_of_unit: for each unit the frame of the first level that it belongs to; -1 for none.
        captures: for each storage the frames of the first level that hold it.
        encode: operators that some replay runs.
        lasting: those among them that run again from what lasts of their results.
        cuts: operators at which units begin, and the end.
        takes: for each operator, what it takes as it runs.
        needs: for each saving, what the backward pass takes from when it asks for it until it asks for the next.
    """

    signature: tuple[Signature, ...]
    treatments: dict[tuple[int, int], tuple[Treatment, int]]
    frames: list[Frame]
    frame_of_unit: list[int]
    captures: dict[int, tuple[int, ...]]
    encode: frozenset[int]
    cuts: tuple[int, ...]
    lasting: frozenset[int] = frozenset()
    takes: tuple[Takes, ...] = ()
    needs: dict[tuple[int, int], Takes] = field(default_factory=dict)

    @property
    def replayed_seconds(self) -> float:
        """Time that all replays take, by the forward pass's measured times."""
        return sum(frame.program.seconds for frame in self.frames)


class Savings:
    """Which storages each unit saves, and which saving counts to which unit.

    Attributes:
        unit_of: the unit that each saving (storage, operators run so far) counts to.
        of_unit: for each unit what it saves and plans may drop.
    """

    def __init__(self, tape: Tape, cuts: Sequence[int]) -> None:
        last_read, lasting = last_reads(tape), tape.lasting
        unit_of_op = [0] * (len(tape.ops) + 1)
        for unit in range(len(cuts) - 1):
            for op in range(cuts[unit], cuts[unit + 1]):
                unit_of_op[op] = unit
        self.unit_of: dict[tuple[int, int], int] = {}
        self.of_unit: list[set[int]] = [set() for _ in range(len(cuts) - 1)]
        for storage in tape.storages:
            for saved_at in storage.saved_at:
                unit = unit_of_op[home(tape, storage.number, saved_at, last_read)]
                self.unit_of[(storage.number, saved_at)] = unit
                if storage.number not in lasting:
                    self.of_unit[unit].add(storage.number)


def compile_plan(
    tape: Tape,
    cuts: Sequence[int],
    options: Sequence[Sequence[UnitOption]],
    items: Sequence[Kept | Segment],
) -> StepPlan:
    """Turn a schedule of the planner into what the tape does.

    Args:
        tape: the pass that was measured.
        cuts: operators at which units begin, and the number of operators.
        options: for each unit what its options mean, in the chain's order.
        items: the schedule.
    """
    savings = Savings(tape, cuts)
    maker = _Maker(tape, cuts, options, savings)
    treatments: dict[tuple[int, int], tuple[Treatment, int]] = {}
    frame_of_unit = [-1] * (len(cuts) - 1)
    for item in items:
        if isinstance(item, Segment):
            frame = maker.segment(item)
            for unit in range(item.start, item.stop):
                frame_of_unit[unit] = frame
        elif maker.option(item).dropped:
            frame_of_unit[item.unit] = maker.reduced(item)
    kept = {item.unit: maker.option(item) for item in items if isinstance(item, Kept)}
    lasting = tape.lasting
    for key, unit in savings.unit_of.items():
        treatments[key] = (Treatment.KEEP if key[0] in lasting else _treatment(kept.get(unit), key[0]), unit)
    captures: dict[int, list[int]] = {}
    for frame in {index for index in frame_of_unit if index >= 0}:
        for number in maker.frames[frame].program.inputs:
            captures.setdefault(number, []).append(frame)
    encode = frozenset(op for frame in maker.frames for op in frame.program.ops)
    return StepPlan(
        signature=tape.signature(),
        treatments=treatments,
        frames=maker.frames,
        frame_of_unit=frame_of_unit,
        captures={number: tuple(frames) for number, frames in captures.items()},
        encode=encode,
        lasting=frozenset(op for op in encode if tape.ops[op].lasting),
        cuts=tuple(cuts),
        takes=tuple(_takes(tape, op) for op in tape.ops),
        needs=_needs(tape),
    )


def _takes(tape: Tape, op: TapeOp) -> Takes:
    highest = sum(tape.storages[number].nbytes for number in op.created) + op.scratch
    return Takes(highest, max(highest, op.turnover))


def _needs(tape: Tape) -> dict[tuple[int, int], Takes]:
    needs: dict[tuple[int, int], Takes] = {}
    key, before, live, turnover = (-1, -1), 0, 0, 0
    for event in tape.backward:
        now = event.live + event.gradients
        if event.kind == "need":
            key, before, turnover = (event.storage, event.saved_at), live, 0
        turnover += max(now - live, event.turnover)
        known = needs.get(key, NOTHING)
        needs[key] = Takes(max(known.highest, now + event.scratch - before), max(known.turnover, turnover))
        live = now
    return needs


def _treatment(option: UnitOption | None, number: int) -> Treatment:
    if option is None or number in option.dropped:
        return Treatment.DROP
    if number in option.spilled:
        return Treatment.SPILL
    return Treatment.COMPACT if number in option.compact else Treatment.KEEP


class _Maker:
    def __init__(
        self, tape: Tape, cuts: Sequence[int], options: Sequence[Sequence[UnitOption]], savings: Savings
    ) -> None:
        self._tape = tape
        self._cuts = cuts
        self._options = options
        self._savings = savings
        self.frames: list[Frame] = []

    def option(self, item: Kept) -> UnitOption:
        return self._options[item.unit][item.option]

    def reduced(self, item: Kept) -> int:
        """A frame over one unit that keeps some of its saved storages and replays the others from them."""
        option = self.option(item)
        kept = frozenset(self._savings.of_unit[item.unit]) - option.dropped
        made = program(self._tape, option.dropped, self._cuts[item.unit], kept=kept)
        fills = tuple(Fill(number, item.unit) for number in sorted(option.dropped))
        return self._add(item.unit, item.unit + 1, made, fills, ())

    def segment(self, item: Segment) -> int:
        """A frame over several units, with whatever its replay opens inside."""
        fills: list[Fill] = []
        inner: list[int] = []
        for each in item.inside:
            if isinstance(each, Segment):
                inner.append(self.segment(each))
                continue
            option = self.option(each)
            fills += [
                Fill(number, each.unit, number in option.compact)
                for number in sorted(self._savings.of_unit[each.unit] - option.dropped)
            ]
            if option.dropped:
                inner.append(self.reduced(each))
        spare = frozenset(number for index in inner for number in self.frames[index].program.inputs)
        targets = {fill.number for fill in fills}
        made = program(self._tape, targets, self._cuts[item.start], spare=spare)
        return self._add(item.start, item.stop, made, tuple(fills), tuple(inner), item.spilled)

    def _add(
        self,
        start: int,
        stop: int,
        made: Program,
        fills: tuple[Fill, ...],
        inner: tuple[int, ...],
        spilled: bool = False,
    ) -> int:
        self.frames.append(Frame(len(self.frames), start, stop, made, fills, inner, spilled))
        return len(self.frames) - 1
