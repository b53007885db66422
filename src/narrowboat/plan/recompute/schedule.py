"""A schedule of keeping and recomputing, what it says in words, and what it takes: an exact count, unit by unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from narrowboat.errors import UsageError
from narrowboat.plan.recompute.chain import Chain


@dataclass(frozen=True, slots=True)
class Kept:
    """A unit whose saved tensors come back in the way of one of its options.

    Attributes:
        unit: the unit's number.
        option: the option's number.
        spilled: whether the unit's inputs leave memory too, but for what memory holds for others anyway; only with
            an option that writes to storage, whose seconds cover it.
    """

    unit: int
    option: int = 0
    spilled: bool = False

    @property
    def start(self) -> int:
        """The unit, as the first of one."""
        return self.unit

    @property
    def stop(self) -> int:
        """The unit after it."""
        return self.unit + 1


@dataclass(frozen=True, slots=True)
class Segment:
    """Units that save nothing in this pass; their inputs wait, and the forward runs again before their backward.

    Attributes:
        start: the first unit.
        stop: the unit after the last.
        inside: the schedule of the pass that runs again, over the same units.
        spilled: whether the segment's inputs wait on storage, but for those that memory holds for others anyway.
    """

    start: int
    stop: int
    inside: tuple[Item, ...]
    spilled: bool = False


Item = Kept | Segment


@dataclass(frozen=True, slots=True)
class Schedule:
    """What to do with every unit, in the order of the forward.

    Attributes:
        seconds: of forward, replays and backward, by the chain's own figures.
        peak_bound: bytes at the worst moment, by the chain's own figures.
        items: cover all units in order; the last one is kept.
    """

    seconds: float
    peak_bound: int
    items: tuple[Item, ...]

    def describe(self, chain: Chain) -> str:
        """One line such as ``kept 0-3, recomputed 4-9 (kept 4, recomputed 5-9), kept 10``."""
        return _describe(chain, self.items)


@dataclass(frozen=True, slots=True)
class Count:
    """What a schedule takes.

    Attributes:
        seconds: of forward, replays and backward.
        peak: bytes at the worst moment.
        unit: the unit that was at work then.
    """

    seconds: float
    peak: int
    unit: int


def evaluate(chain: Chain, items: Sequence[Item]) -> tuple[float, int]:
    """Seconds and peak bytes of a schedule, counted to the byte.

    Raises:
        UsageError: the items do not cover the units in order, the last unit of a pass is not kept, or something is
            written to storage where it cannot be.
    """
    found = count(chain, items)
    return found.seconds, found.peak


def count(chain: Chain, items: Sequence[Item]) -> Count:
    """As ``evaluate``, with the unit that sets the peak."""
    walk = _Walk(chain)
    walk.through(items, 0, len(chain.units), 0, replay=False)
    return Count(walk.seconds, walk.peak, walk.unit)


class _Walk:
    """Carries a schedule out on paper."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.seconds, self.peak, self.unit = chain, 0.0, 0, 0

    def through(self, items: Sequence[Item], start: int, stop: int, held: int, *, replay: bool) -> None:
        """Forward and backward over ``[start, stop)``, ``held`` bytes being held by others and by its inputs."""
        _check_cover(items, start, stop)
        waiting = self.chain.gradient_after(stop - 1)
        before: list[int] = []  # bytes held when an item began: its backward finds the same
        inputs: int | None = None  # the last boundary in memory, None where a kept unit needs this one itself
        for item in items:
            before.append(held)
            if isinstance(item, Kept):
                held = self._forward_kept(item, held, waiting, replay)
            else:
                held = self._forward_dropped(item, held, waiting, replay)
            if item.spilled:
                held -= self._release(item, inputs, replay)
            else:
                inputs = None if self._needs_outputs(item) else item.start
        for item, held_then in zip(reversed(items), reversed(before), strict=True):
            if isinstance(item, Kept):
                self._backward(item, held_then)
            else:
                self.through(item.inside, item.start, item.stop, held_then, replay=True)

    def _forward_kept(self, item: Kept, held: int, waiting: int, replay: bool) -> int:
        unit = self.chain.units[item.unit]
        option = unit.options[item.option]
        if replay and option.spilled:
            raise UsageError(f"unit {unit.name}: option {option.name} writes to storage, which a replay does not")
        if item.spilled and not option.spilled:
            raise UsageError(f"unit {unit.name}: option {option.name} writes nothing, so its inputs must stay")
        self.seconds += (unit.replay if replay else unit.forward) + option.forward_extra
        self._reach(held + option.forward_peak + waiting, item.unit)
        return held + option.held

    def _forward_dropped(self, item: Segment, held: int, waiting: int, replay: bool) -> int:
        for number in range(item.start, item.stop):
            unit = self.chain.units[number]
            self.seconds += unit.replay if replay else unit.forward
            self._reach(held + self.chain.carry(item.start, number) + unit.dropped_peak + waiting, number)
        return held + self.chain.carry(item.start, item.stop)

    def _needs_outputs(self, item: Item) -> bool:
        return isinstance(item, Kept) and not self.chain.units[item.unit].options[item.option].spilled

    def _release(self, item: Item, inputs: int | None, replay: bool) -> int:
        """Bytes of an item's inputs that leave memory."""
        if replay or inputs is None or not self.chain.has_storage:
            raise UsageError(f"the inputs of unit {item.start} cannot be on storage here: something else needs them")
        released = self.chain.released(inputs, item.start, item.stop)
        if isinstance(item, Segment):  # a kept unit's option has these seconds already
            self.seconds += released * self.chain.transfer
        return released

    def _backward(self, item: Kept, held: int) -> None:
        unit = self.chain.units[item.unit]
        option = unit.options[item.option]
        self.seconds += unit.backward + option.backward_extra
        self._reach(held + option.backward_peak, item.unit)

    def _reach(self, nbytes: int, unit: int) -> None:
        if nbytes > self.peak:
            self.peak, self.unit = nbytes, unit


def _check_cover(items: Sequence[Item], start: int, stop: int) -> None:
    here = start
    for item in items:
        if item.start != here or item.stop <= here:
            raise UsageError(f"a schedule of units {start} to {stop - 1} goes on at {item.start}, not at {here}")
        here = item.stop
    if here != stop or not isinstance(items[-1], Kept):
        raise UsageError(f"a schedule of units {start} to {stop - 1} must end there, and keep the last one")


def _describe(chain: Chain, items: Sequence[Item]) -> str:
    def action(item: Item) -> tuple[str, bool, int]:
        if isinstance(item, Segment):
            return "", item.spilled, item.start
        return (chain.units[item.unit].options[item.option].name if item.option else "kept"), item.spilled, -1

    parts = []
    for (word, spilled, _), group in groupby(items, key=action):
        members = list(group)
        if isinstance(members[0], Segment):
            parts.append(_describe_segment(chain, members[0]))
            continue
        inputs = " with its inputs" if len(members) == 1 else " with their inputs"
        parts.append(f"{word} {_span(members[0].start, members[-1].start)}" + (inputs if spilled else ""))
    return ", ".join(parts)


def _describe_segment(chain: Chain, item: Segment) -> str:
    text = f"recomputed {_span(item.start, item.stop - 1)}" + (" from storage" if item.spilled else "")
    plain = all(isinstance(inner, Kept) and not inner.option for inner in item.inside)
    return text if plain else f"{text} ({_describe(chain, item.inside)})"


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
