"""Who holds how many bytes, and the most there ever were."""

from __future__ import annotations

import threading


class Ledger:
    """Named byte counts with a running total and its peak. Thread-safe.

    Names in use: ``resident`` and ``window`` (the slab), ``staging`` (the readers' buffers), ``escaped`` (weights
    copied aside because somebody kept a view of them), ``off_plan`` (weights loaded outside their place), ``experts``
    (the cache of those read on demand).
    """

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()
        self.total = 0
        self.peak = 0

    def add(self, name: str, nbytes: int) -> None:
        """Count ``nbytes`` more (or fewer, if negative) under ``name``."""
        with self._lock:
            self._held[name] = self._held.get(name, 0) + nbytes
            self.total += nbytes
            self.peak = max(self.peak, self.total)

    def set(self, name: str, nbytes: int) -> None:
        """Make the count under ``name`` ``nbytes``."""
        self.add(name, nbytes - self._held.get(name, 0))

    def held(self) -> dict[str, int]:
        """A copy of the counts, bytes by name."""
        with self._lock:
            return {name: nbytes for name, nbytes in self._held.items() if nbytes}
