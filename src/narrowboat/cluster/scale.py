"""How many nodes a best-effort task runs on: as many as its load asks for, with hysteresis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_MORE = 2.0  # requests that wait or run, per node, above which another node helps
_FEWER = 0.5
_GROW = 2.0  # seconds above, before another node is taken
_SHRINK = 30.0  # seconds below, before one is given back
_WEIGHT = 0.3  # of the newest look in the average


@dataclass
class Demand:
    """The load of one task, looked at again and again.

    Attributes:
        average: requests under way, smoothed.
    """

    average: float = 0.0
    _since: float | None = None
    _way: Literal["more", "fewer", ""] = ""

    def look(self, now: float, under_way: int, replicas: int, most: int) -> int:
        """How many nodes more it should have: 1, 0 or -1.

        Args:
            now: seconds of a clock that does not go back.
            under_way: requests that wait or run, on all nodes.
            replicas: nodes that run it.
            most: nodes that could.
        """
        self.average += _WEIGHT * (under_way - self.average)
        busy = min(self.average, under_way) > _MORE * max(replicas, 1)  # the average outlives a burst
        way: Literal["more", "fewer", ""] = ""
        if busy and replicas < most:
            way = "more"
        elif replicas > 1 and self.average / (replicas - 1) < _FEWER:
            way = "fewer"
        if way != self._way or self._since is None:
            self._way, self._since = way, now
        if not way or now - self._since < (_GROW if way == "more" else _SHRINK):
            return 0
        self._since = now  # one at a time, and time to see what it did
        return 1 if way == "more" else -1
