"""Counts that go on where those of a process begin anew."""

from __future__ import annotations

from collections.abc import Hashable


class GrowingCounts:
    """By how much counts of another process have grown, whatever becomes of it."""

    def __init__(self) -> None:
        self._last: dict[Hashable, int] = {}

    def by(self, key: Hashable, value: int) -> int:
        """Since it was last asked; a count that fell has begun anew."""
        last = self._last.get(key, 0)
        self._last[key] = value
        return value - last if value >= last else value

    def restarted(self) -> None:
        """All begin at 0."""
        self._last.clear()
