"""Time that segments took too long, held against what the supply may withhold; for runs without an end."""

from __future__ import annotations


class Withheld:
    """As ``tasks.conform`` judges it: at most ``delay + (1 - share) * d`` in any stretch of time ``d``.

    What is lost is kept as one level that drains, so that nothing grows however long it goes on.

    Args:
        share: of the core that is there, over 0 and at most 1.
        delay: microseconds.
    """

    def __init__(self, share: float, delay: int) -> None:
        self._rate, self._delay = 1 - share, delay
        self._level = 0.0
        self._at = 0

    def bear(self, begin: int, end: int, excess: int) -> bool:
        """Count a segment that took ``excess`` microseconds too long, in order of the ends.

        Returns:
            Whether the supply allows for it. What it does not is forgotten once it has been told: a fault is not
            told again with every segment that comes after it.
        """
        drained = self._level - self._rate * max(end - self._at, 0)
        self._level = max(drained, -self._rate * (end - begin)) + excess
        self._at = max(self._at, end)
        if self._level <= self._delay:
            return True
        self._level = float(self._delay)
        return False
