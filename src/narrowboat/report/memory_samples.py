"""Memory over time, by looking at it now and then from a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from narrowboat.errors import UsageError
from narrowboat.machine.memory import resident_bytes

if TYPE_CHECKING:
    from narrowboat.stream.session import Session

_EVERY = 0.02  # seconds between two looks; each takes some microseconds
_KEPT = 2_000  # looks; then every second one goes, and the next ones come half as often


class MemorySamples:
    """A context manager that notes the process's resident memory over a baseline, and the budget in force.

    The peaks between two looks are not seen; ``session.stats()["peak_bytes"]`` knows them.

    Args:
        session: whose baseline and budget; None for those that follow.
        baseline: bytes that count as nothing; resident memory at the beginning if neither is given.
        budget: tells the budget in bytes; None where there is none to draw.

    Attributes:
        points: ``(seconds since the beginning, bytes over the baseline)``.
        budgets: ``(seconds since the beginning, bytes)``, at the beginning and where it changed.

    Raises:
        UsageError: the session's model is on a device, whose memory is not the process's.
    """

    def __init__(
        self, session: Session | None = None, *, baseline: int | None = None, budget: Callable[[], int] | None = None
    ) -> None:
        if session is not None:
            if session.ground.device is not None:
                raise UsageError("memory is sampled on the host; the model of this session is on a device")
            baseline, budget = session.baseline, lambda: session.budget
        self._baseline = resident_bytes() if baseline is None else baseline
        self._budget = budget
        self._every = _EVERY
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="narrowboat-memory-samples", daemon=True)
        self._begun = 0.0
        self.points: list[tuple[float, int]] = []
        self.budgets: list[tuple[float, int]] = []

    def __enter__(self) -> MemorySamples:
        self._begun = time.perf_counter()
        self._note()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._note()

    def _look(self) -> None:
        while not self._stop.wait(self._every):
            self._note()

    def _note(self) -> None:
        when = round(time.perf_counter() - self._begun, 4)
        self.points.append((when, resident_bytes() - self._baseline))
        if self._budget is not None:
            budget = self._budget()
            if not self.budgets or self.budgets[-1][1] != budget:
                self.budgets.append((when, budget))
        if len(self.points) >= _KEPT:
            self.points = self.points[::2]
            self._every *= 2
