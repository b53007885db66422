"""From a tape to the planner's chain: what each unit holds, peaks at, and takes, with every option. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from narrowboat.plan.recompute import Chain, Option, Unit
from narrowboat.train.measure.reduce import maps_rule, sage_rule
from narrowboat.train.measure.units import choose_cuts, unit_names
from narrowboat.train.tape.frames import Savings, UnitOption
from narrowboat.train.tape.slices import SliceConflictError, boundary, last_reads, needed_across, program
from narrowboat.train.tape.structure import Tape

_SMALLEST_SPILL = 64 << 10
_NEVER_FITS = 1 << 55


@dataclass(frozen=True, slots=True)
class Rates:
    """What the chain needs to know of the machine.

    There may be two places for what is spilled. A device's activations go to pinned host memory first, and on to the
    folder where that is full; a process's go to the folder. A chain knows one rate, so it is built for a *level*: for
    "host" only as many units may spill as pinned memory has room for, those that take longest to recompute per byte,
    at the rate of that memory. For "storage" all may, at a mean rate: every byte takes what it takes to pinned memory
    and back, and the share that has no room there, were all that autograd saves spilled, takes the folder's time too.
    That is too much where a plan spills less; a plan that fits into pinned memory is found on the level of its own.

    Copies of a device are made by engines of their own: what a unit moves is hidden behind that unit's own computing
    for ``overlap`` of it, and never for longer than the unit computes. Storage of a process is hidden for ``overlap``.

    Attributes:
        compact: seconds per byte of compacting a saved storage, and of restoring it.
        write, read: seconds per byte to and from the spill folder; None without one.
        overlap: share of reading and writing that goes on while something is computed.
        host_write, host_read: seconds per byte from a device to pinned host memory and back; None where there is none.
        host_room: bytes of storages that pinned memory has room for.
        limit: bytes of storages that units may spill in all; None for any number. Set by ``at``.
        largest: bytes of the largest storage that can be spilled; None for any. What is larger than pinned memory
            cannot pass through it. Set by ``at``.
        engines: copies go on beside the computing, and no longer than it. Set by ``at``.
    """

    compact: float = 1.5e-9
    write: float | None = None
    read: float | None = None
    overlap: float = 0.7
    host_write: float | None = None
    host_read: float | None = None
    host_room: int = 0
    limit: int | None = None
    largest: int | None = None
    engines: bool = False

    @property
    def levels(self) -> tuple[str, ...]:
        """Those that there are, nearest first."""
        host = ("host",) if self.host_write is not None and self.host_room > 0 else ()
        return (*host, *(("storage",) if self.write is not None and self.read is not None else ()))

    def at(self, level: str, saved: int, room: int) -> Rates:
        """The rates of one level.

        Args:
            level: one of ``levels``; "" for where nothing is spilled.
            saved: bytes that autograd saves.
            room: of ``host_room``, what one pass may have.
        """
        if not level or self.host_write is None or self.host_read is None:
            return self
        if level == "host":
            return replace(self, write=self.host_write, read=self.host_read, limit=room, largest=room, engines=True)
        assert self.write is not None and self.read is not None
        beyond = max(0, saved - room) / max(saved, 1)
        write, read = self.host_write + beyond * self.write, self.host_read + beyond * self.read
        return replace(self, write=write, read=read, largest=self.host_room, engines=True)

    def exposed(self, seconds: float, beside: float) -> float:
        """Of so many seconds of reading or writing, those for which computing waits.

        Args:
            seconds: of reading or writing.
            beside: of computing at the same time.
        """
        hidden = self.overlap * seconds
        return seconds - (min(hidden, beside) if self.engines else hidden)


@dataclass(frozen=True, slots=True)
class Techniques:
    """Which of the planner's means may be used; each can be switched off to see its effect.

    Attributes:
        recompute: stretches are dropped and replayed (dynamic gradient checkpointing in SAGE's terms).
        reduce: cheap subgraphs are recomputed inside a unit (SAGE's subgraph reduction).
        compact: masks as bits and indices as small integers (SAGE's operator level, without loss).
        spill: activations go to storage, if there is a folder.
    """

    recompute: bool = True
    reduce: bool = True
    compact: bool = True
    spill: bool = True


@dataclass(frozen=True, slots=True)
class TrainingChain:
    """The planner's chain, and what its options mean on the tape.

    Attributes:
        tape: the pass.
        cuts: operators at which units begin, and the number of operators.
        chain: for the planner.
        options: per unit, in the chain's order.
        lasting: bytes that stay whatever the plan, which the chain does not count.
    """

    tape: Tape
    cuts: tuple[int, ...]
    chain: Chain
    options: tuple[tuple[UnitOption, ...], ...]
    lasting: int = 0


def build_chain(
    tape: Tape,
    techniques: Techniques = Techniques(),
    rates: Rates = Rates(),
    cuts: tuple[int, ...] | None = None,
    unsafe: frozenset[int] = frozenset(),
) -> TrainingChain:
    """The chain of a tape.

    Args:
        tape: with its backward pass.
        techniques: what may be used.
        rates: of the machine.
        cuts: where units begin; chosen by ``choose_cuts`` where None.
        unsafe: storages whose replay gave other bits in a check; units that made them are kept.
    """
    cuts = choose_cuts(tape) if cuts is None else cuts
    return _Builder(tape, cuts, techniques, rates, unsafe).build()


class _Builder:
    def __init__(
        self, tape: Tape, cuts: tuple[int, ...], techniques: Techniques, rates: Rates, unsafe: frozenset[int]
    ) -> None:
        self._tape = tape
        self._cuts = cuts
        self._count = len(cuts) - 1
        self._techniques = techniques
        self._rates = rates
        self._unsafe = unsafe
        self._savings = Savings(tape, cuts)
        needed = needed_across(tape, last_reads(tape))
        self._boundaries = [boundary(tape, place, needed) for place in cuts]
        self._first_saver: dict[int, int] = {}
        for (number, _), unit in sorted(self._savings.unit_of.items(), key=lambda item: item[1]):
            self._first_saver.setdefault(number, unit)
        self._natural = self._live_bytes()
        self._windows = self._backward_windows()
        self._spilling = self._units_that_spill()

    def build(self) -> TrainingChain:
        """The tape in units, each with what it can do about its bytes and what that costs."""
        names = unit_names(self._tape, self._cuts)
        units, options = [], []
        for index in range(self._count):
            meanings, costs = self._options(index)
            forward, replay, backward = self._seconds(index)
            unit = Unit(
                name=names[index],
                forward=forward,
                backward=backward,
                replay=replay,
                options=tuple(costs),
                # A unit that must not be replayed fits nowhere dropped.
                dropped_peak=_NEVER_FITS if self._unsafe_unit(index) else self._dropped_peak(index),
                gradient=self._windows[index].after,
            )
            units.append(unit)
            options.append(tuple(meanings))
        boundaries = self._techniques.spill and self._boundaries_spill
        chain = Chain(
            units=tuple(units),
            carried=self._carried(),
            write=self._rates.write if boundaries else None,
            read=self._rates.read if boundaries else None,
        )
        lasting = self._bytes(self._tape.lasting)
        return TrainingChain(self._tape, self._cuts, chain, tuple(options), lasting)

    # -- forward -------------------------------------------------------------------------------------------------

    def _bytes(self, numbers: frozenset[int] | set[int]) -> int:
        return sum(self._tape.storages[number].nbytes for number in numbers)

    def _live_bytes(self) -> np.ndarray:
        """Bytes alive during each operator when autograd keeps nothing."""
        count = len(self._tape.ops)
        change = np.zeros(count + 1, dtype=np.int64)
        for storage in self._tape.storages:
            change[storage.creator] += storage.nbytes
            change[min(max(storage.dies, storage.creator + 1), count)] -= storage.nbytes
        return np.cumsum(change)[:count] + np.array([op.scratch for op in self._tape.ops], dtype=np.int64)

    def _alive(self, number: int, start: int, stop: int) -> tuple[int, int]:
        """The operators of a unit during which a storage is alive by itself, as offsets into the unit."""
        storage = self._tape.storages[number]
        first = max(storage.creator, start)
        last = min(max(storage.dies, storage.creator + 1), stop)
        return first - start, max(last, first) - start

    def _profile(self, index: int) -> np.ndarray:
        """Bytes alive during each operator of a unit beyond its inputs, when nothing is saved."""
        start, stop = self._cuts[index], self._cuts[index + 1]
        live = self._natural[start:stop].copy()
        for number in self._boundaries[index]:
            first, last = self._alive(number, start, stop)
            live[first:last] -= self._tape.storages[number].nbytes
        return live

    def _dropped_peak(self, index: int) -> int:
        return int(max(self._profile(index).max(initial=0), 0))

    def _kept_peak(self, index: int, held: dict[int, int]) -> int:
        """Worst moment of the forward when these storages (number to bytes) stay after they would have died."""
        start, stop = self._cuts[index], self._cuts[index + 1]
        live = self._profile(index)
        for number, nbytes in held.items():
            if self._tape.storages[number].creator < start:
                continue
            _, last = self._alive(number, start, stop)
            live[last:] += nbytes
        return int(max(live.max(initial=0), 0))

    def _carried(self) -> np.ndarray:
        carried = np.zeros((self._count + 1, self._count + 1), dtype=np.int64)
        for i in range(self._count + 1):
            for j in range(i + 1, self._count + 1):
                carried[i, j] = self._bytes(self._boundaries[j] - self._boundaries[i])
        return carried

    def _seconds(self, index: int) -> tuple[float, float, float]:
        ops = self._tape.ops[self._cuts[index] : self._cuts[index + 1]]
        forward = sum(op.seconds for op in ops)
        return forward, sum(op.replay for op in ops), self._windows[index].seconds or 2 * forward

    # -- backward ------------------------------------------------------------------------------------------------

    def _backward_windows(self) -> list[_Window]:
        windows = [_Window() for _ in range(self._count)]
        unit_of = self._savings.unit_of
        left = dict.fromkeys(unit_of, 0)
        for event in self._tape.backward:
            if event.kind == "done":
                left[(event.storage, event.saved_at)] += 1
        holders: dict[tuple[int, int], int] = {}
        for key, unit in unit_of.items():
            holders[(key[0], unit)] = holders.get((key[0], unit), 0) + left[key]
        current, live, since = self._count - 1, 0, 0.0
        alive = {key for key, count in holders.items() if count}
        held = self._held_from(alive, current)
        windows[current].see(live, held)
        for event in self._tape.backward:
            live = event.live
            if event.kind == "need":
                unit = unit_of[(event.storage, event.saved_at)]
                if unit < current:
                    for passed in range(current, unit, -1):
                        windows[passed].after = live
                    windows[current].seconds += event.seconds - since
                    current, since = unit, event.seconds
                    held = self._held_from(alive, current)
            elif event.kind == "done":
                key = (event.storage, unit_of[(event.storage, event.saved_at)])
                holders[key] -= 1
                if holders[key] == 0:
                    alive.discard(key)
                    held = self._held_from(alive, current)
            windows[current].see(live + event.scratch, held)
        windows[current].after = live
        windows[current].seconds += (self._tape.backward_seconds - since) if self._tape.backward_seconds else 0.0
        return windows

    def _held_from(self, alive: set[tuple[int, int]], current: int) -> int:
        """Bytes still saved by a unit or by later ones, beyond its inputs."""
        numbers = {number for number, unit in alive if unit >= current}
        return self._bytes(numbers - self._boundaries[current])

    # -- options -------------------------------------------------------------------------------------------------

    def _options(self, index: int) -> tuple[list[UnitOption], list[Option]]:
        saved = frozenset(self._savings.of_unit[index])
        meanings = [UnitOption("keep")]
        costs = [self._kept("keep", index, saved, {})]
        shrinking = self._shrinking(index, saved)
        if self._techniques.compact and shrinking:
            meanings.append(UnitOption("compact", compact=frozenset(shrinking)))
            costs.append(self._kept("compact", index, saved, shrinking))
        if self._techniques.reduce and not self._unsafe_unit(index):
            start = self._cuts[index]
            found = [sage_rule(self._tape, saved, start), maps_rule(self._tape, saved, start)]
            for name, dropped in zip(("reduced", "reduced further"), found, strict=True):
                if dropped and all(dropped != meaning.dropped for meaning in meanings):
                    self._add_reduced(name, index, saved, dropped, meanings, costs)
        if index in self._spilling:
            self._add_spilled(index, saved, meanings, costs)
        return meanings, costs

    def _spillable(self, index: int) -> frozenset[int]:
        saved = (self._tape.storages[number] for number in self._savings.of_unit[index])
        return frozenset(each.number for each in saved if each.nbytes >= _SMALLEST_SPILL and self._passes(each.nbytes))

    def _passes(self, nbytes: int) -> bool:
        return self._rates.largest is None or nbytes <= self._rates.largest

    @property
    def _boundaries_spill(self) -> bool:
        """Whether whatever boundaries and units spill is within the limits together."""
        on_boundaries = frozenset().union(*self._boundaries)
        if not all(self._passes(self._tape.storages[number].nbytes) for number in on_boundaries):
            return False
        if self._rates.limit is None:
            return True
        every = on_boundaries.union(*(self._spillable(index) for index in range(self._count)))
        return self._bytes(every) <= self._rates.limit

    def _units_that_spill(self) -> set[int]:
        """Units that may spill: all, or those within the limit that take longest to recompute for their bytes."""
        if not self._techniques.spill or self._rates.write is None or self._rates.read is None:
            return set()
        every = {index for index in range(self._count) if self._spillable(index)}
        limit = self._rates.limit
        if limit is None:
            return every

        def worth(index: int) -> tuple[float, int]:
            seconds = sum(op.replay for op in self._tape.ops[self._cuts[index] : self._cuts[index + 1]])
            return seconds / max(self._bytes(self._spillable(index)), 1), -index

        chosen: set[int] = set()
        spilled: frozenset[int] = frozenset()
        for index in sorted(every, key=worth, reverse=True):
            together = spilled | self._spillable(index)
            if self._bytes(together) <= limit:
                chosen.add(index)
                spilled = together
        return chosen

    def _unsafe_unit(self, index: int) -> bool:
        start, stop = self._cuts[index], self._cuts[index + 1]
        return any(start <= self._tape.storages[number].creator < stop for number in self._unsafe)

    def _shrinking(self, index: int, saved: frozenset[int]) -> dict[int, int]:
        stays = self._boundaries[index] | self._boundaries[index + 1]
        return {
            number: self._tape.storages[number].shrinks
            for number in saved - stays
            if 0 < self._tape.storages[number].shrinks < self._tape.storages[number].nbytes
        }

    def _held(self, index: int, numbers: frozenset[int], shrunk: dict[int, int]) -> int:
        stays = (numbers | self._boundaries[index + 1]) - self._boundaries[index]
        return sum(shrunk.get(number, self._tape.storages[number].nbytes) for number in stays)

    def _kept(self, name: str, index: int, saved: frozenset[int], shrunk: dict[int, int]) -> Option:
        held = {number: shrunk.get(number, self._tape.storages[number].nbytes) for number in saved}
        moved = sum(self._tape.storages[number].nbytes for number in shrunk)
        return Option(
            name=name,
            held=self._held(index, saved, shrunk),
            forward_peak=self._kept_peak(index, held),
            backward_peak=self._windows[index].peak,
            forward_extra=moved * self._rates.compact,
            backward_extra=moved * self._rates.compact,
        )

    def _add_reduced(
        self,
        name: str,
        index: int,
        saved: frozenset[int],
        dropped: frozenset[int],
        meanings: list[UnitOption],
        costs: list[Option],
    ) -> None:
        kept = saved - dropped
        try:
            made = program(self._tape, dropped, self._cuts[index], kept=kept)
        except SliceConflictError:
            return
        held = {number: self._tape.storages[number].nbytes for number in kept}
        window = self._windows[index]
        replaying = self._bytes(kept - self._boundaries[index]) + made.peak + window.before
        meanings.append(UnitOption(name, dropped=dropped))
        costs.append(
            Option(
                name=name,
                held=self._held(index, kept, {}),
                forward_peak=self._kept_peak(index, held),
                backward_peak=max(window.peak, replaying),
                backward_extra=made.seconds,
            )
        )

    def _add_spilled(self, index: int, saved: frozenset[int], meanings: list[UnitOption], costs: list[Option]) -> None:
        assert self._rates.write is not None and self._rates.read is not None
        spilled = self._spillable(index)
        # What an earlier unit saved as well is on storage already.
        moved = self._bytes({number for number in spilled if self._first_saver[number] == index})
        plain = self._kept("spill", index, saved, {})
        forward, _, backward = self._seconds(index)
        outputs = self._boundaries[index + 1] - self._boundaries[index]
        unwritten = saved - spilled - self._boundaries[index]
        meanings.append(UnitOption("spill", spilled=spilled))
        costs.append(
            Option(
                name="spill",
                held=self._bytes(outputs | unwritten),
                forward_peak=plain.forward_peak,
                backward_peak=plain.backward_peak,
                forward_extra=self._rates.exposed(moved * self._rates.write, forward),
                backward_extra=self._rates.exposed(moved * self._rates.read, backward),
                spilled=max(moved, 1),
            )
        )


class _Window:
    """The part of the backward pass that belongs to one unit."""

    __slots__ = ("after", "before", "peak", "seconds")

    def __init__(self) -> None:
        self.peak = 0
        self.before = -1  # gradients alive as it begins
        self.after = 0  # gradients alive as it ends
        self.seconds = 0.0

    def see(self, live: int, held: int) -> None:
        if self.before < 0:
            self.before = live
        self.peak = max(self.peak, live + held)
