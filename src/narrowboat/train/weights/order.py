"""In which order a training step touches the weights, learnt from the step before.

One step after the other touches the same weights in the same order: forward, backward, and what is computed again in
between. The order is a prediction, for speed; a step that departs from it only reads more.
"""

from __future__ import annotations

import math
from bisect import bisect_left


class TouchOrder:
    """Records the touches of one step and predicts those of the next.

    Attributes:
        pos: touches of the known order that are behind; the next one expected is ``known[pos]``.
        departures: touches of the step in progress that were not the expected ones.
    """

    def __init__(self) -> None:
        self.pos = 0
        self.departures = 0
        self._known: list[int] = []
        self._places: dict[int, list[int]] = {}
        self._recorded: list[int] | None = None
        self._clock = 0
        self._touched: dict[int, int] = {}

    @property
    def known(self) -> tuple[int, ...]:
        """Weights in the order of their touches, a weight as often as it is touched; empty before a whole step."""
        return tuple(self._known)

    def begin_step(self) -> None:
        """A step begins; the record of one that never ended is dropped."""
        self._recorded = []
        self.pos = self.departures = 0

    def end_step(self) -> None:
        """The step is over as a whole: the next one is expected to be like it."""
        if self._recorded:
            self._known = self._recorded
            self._places = {}
            for place, weight in enumerate(self._known):
                self._places.setdefault(weight, []).append(place)
        self._recorded = None
        self.pos = 0

    def touch(self, weight: int) -> None:
        """A weight is used."""
        self._clock += 1
        self._touched[weight] = self._clock
        if self._recorded is None:
            return  # between steps (an evaluation, say): the next step is still expected from its beginning
        self._recorded.append(weight)
        if not self._known:
            return
        if self.pos < len(self._known) and self._known[self.pos] == weight:
            self.pos += 1
            return
        self.departures += 1
        places = self._places.get(weight)
        if places:  # go on from where the order has it next
            self.pos = places[bisect_left(places, self.pos) % len(places)] + 1

    def farness(self, weight: int) -> float:
        """How far away the next use of a weight is: the larger, the better it can do without memory.

        In touches, over the end of the step into the next. Infinite where the order has no use of it. Before an order
        is known: touches since its last use.
        """
        if not self._known:
            last = self._touched.get(weight)
            return math.inf if last is None else float(self._clock - last)
        places = self._places.get(weight)
        if not places:
            return math.inf
        i = bisect_left(places, self.pos)
        return float(places[i] - self.pos if i < len(places) else places[0] + len(self._known) - self.pos)

    def expected(self, ahead: int) -> int:
        """The weight that will be touched after ``ahead`` others (below ``len(known)``)."""
        return self._known[(self.pos + ahead) % len(self._known)]
