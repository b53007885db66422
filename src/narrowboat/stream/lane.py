"""The timeline's lanes of computing and of waiting."""

from __future__ import annotations

from narrowboat.trace import Event, Trace

_SHORT = 2e-5  # seconds; a wait below that is not drawn


class ComputeLane:
    """Draws what is computed between two waits, and the waits.

    Args:
        timeline: where to draw.
    """

    def __init__(self, timeline: Trace) -> None:
        self._timeline = timeline
        self._name, self._since = "", 0.0

    def begin(self, now: float) -> None:
        """A pass begins."""
        self._name, self._since = "", now

    def add(self, name: str, now: float, resume: float | None = None) -> None:
        """Computing stops at ``now``, to wait for ``name`` until ``resume``; or for good."""
        if now > self._since:
            self._timeline.add(Event("compute", self._name, self._since, now))
        if resume is not None and resume - now > _SHORT:
            self._timeline.add(Event("stall", name, now, resume))
        self._name, self._since = name, resume if resume is not None else now
