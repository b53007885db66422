"""Random chains made of tensors, and every schedule of them: what the planner of recomputing is held against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np

from narrowboat.plan.recompute import Chain, Item, Kept, Option, Segment, Unit


@dataclass(frozen=True)
class Tensors:
    """The tensors behind a chain: ``boundaries[i]`` are those made before unit i and needed by it or later.

    Attributes:
        sizes: bytes by tensor.
        boundaries: L + 1 sets.
        private: bytes that an option holds in memory besides its unit's inputs and outputs, by unit and option.
    """

    sizes: list[int]
    boundaries: list[frozenset[int]]
    private: list[list[int]]

    def nbytes(self, *held: frozenset[int]) -> int:
        return sum(self.sizes[tensor] for tensor in frozenset().union(*held))


def random_chain(
    random: Random, count: int, *, most: int = 6, options: int = 2, storage: bool = False
) -> tuple[Chain, Tensors]:
    """A chain of so many units whose boundaries share tensors, with whole seconds, so that sums are exact."""

    def some() -> int:
        return random.randint(0, most)

    spans = [
        (unit, random.randint(unit + 1, count - 1)) for unit in range(count - 1) for _ in range(random.randint(1, 2))
    ]
    sizes = [some() for _ in spans]
    boundaries = [
        frozenset(tensor for tensor, (made, needed) in enumerate(spans) if made < here <= needed)
        for here in range(count + 1)
    ]
    tensors = Tensors(sizes, boundaries, [[some() for _ in range(options)] for _ in range(count)])
    carried = np.array([[tensors.nbytes(late - early) for late in boundaries] for early in boundaries], dtype=np.int64)
    units = []
    for here in range(count):
        made = tensors.nbytes(boundaries[here + 1] - boundaries[here])
        away = [some() if number and storage else 0 for number in range(options)]
        choices = tuple(
            Option(
                name=("spill" if away[number] else "compact") if number else "keep",
                held=private + made,
                forward_peak=some() + private + made,
                backward_peak=some() + private,
                forward_extra=float(random.randint(0, 3)) if number else 0.0,
                backward_extra=float(random.randint(0, 3)) if number else 0.0,
                spilled=away[number],
            )
            for number, private in enumerate(tensors.private[here])
        )
        forward, backward, replay = (float(random.randint(1, 9)) for _ in range(3))
        units.append(Unit(f"unit{here}", forward, backward, replay, choices, some() + made, some()))
    speeds = (float(random.randint(0, 2)), 1.0) if storage else (None, None)
    return Chain(tuple(units), carried, *speeds), tensors


def every_schedule(
    chain: Chain, start: int, stop: int, *, segments: bool = True, replay: bool = False, unneeded: bool = False
) -> Iterator[tuple[Item, ...]]:
    """All schedules of units ``[start, stop)``, whose inputs are ``unneeded`` by what was before."""
    if start == stop:
        yield ()
        return
    release = chain.has_storage and unneeded and not replay
    for number, option in enumerate(chain.units[start].options):
        if replay and option.spilled:
            continue
        away = option.spilled > 0
        for rest in every_schedule(chain, start + 1, stop, segments=segments, replay=replay, unneeded=away):
            yield (Kept(start, number), *rest)
            if release and away:
                yield (Kept(start, number, spilled=True), *rest)
    for end in range(start + 1, stop if segments else 0):
        for inside in every_schedule(chain, start, end, replay=True):
            for rest in every_schedule(chain, end, stop, replay=replay, unneeded=True):
                yield (Segment(start, end, inside), *rest)
                if release:
                    yield (Segment(start, end, inside, spilled=True), *rest)


def peak_by_sets(chain: Chain, tensors: Tensors, items: tuple[Item, ...]) -> int:
    """The peak of a schedule, counted from the sets of tensors that are in memory, not from sums of bytes."""
    peak = 0

    def through(items: tuple[Item, ...], stop: int, sets: list[frozenset[int]], private: int) -> None:
        nonlocal peak
        waiting = chain.gradient_after(stop - 1)
        undo = []
        for item in items:
            undo.append((list(sets), private))
            if isinstance(item, Kept):
                option = chain.units[item.unit].options[item.option]
                peak = max(peak, tensors.nbytes(*sets) + private + option.forward_peak + waiting)
                private += tensors.private[item.unit][item.option]
            else:
                for unit in range(item.start, item.stop):
                    here = tensors.nbytes(*sets, tensors.boundaries[unit])
                    peak = max(peak, here + private + chain.units[unit].dropped_peak + waiting)
            sets = [*(sets[:-1] if item.spilled else sets), tensors.boundaries[item.stop]]
        for item, (sets, private) in zip(reversed(items), reversed(undo), strict=True):
            if isinstance(item, Kept):
                option = chain.units[item.unit].options[item.option]
                peak = max(peak, tensors.nbytes(*sets) + private + option.backward_peak)
            else:
                through(item.inside, item.stop, sets, private)

    through(items, len(chain.units), [tensors.boundaries[0]], 0)
    return peak
