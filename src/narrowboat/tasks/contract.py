"""Holding a client to its contract at the door: what comes beyond it is not let in, and harms nobody."""

from __future__ import annotations


class Bucket:
    """A token bucket, as the generic cell rate algorithm (ITU-T I.371).

    What it lets in never exceeds the arrival curve ``ceil((d + jitter) / period)`` that the analysis assumes.

    Args:
        period: in which one more may come, microseconds.
        jitter: ``(burst - 1) * period`` for a bucket of ``burst`` tokens.
    """

    def __init__(self, period: int, jitter: int) -> None:
        self.period, self.jitter = period, jitter
        self._expected: int | None = None  # when the next would come if all kept the pace

    def wait(self, now: int) -> int:
        """Microseconds until one more may come; 0 if it may now."""
        return 0 if self._expected is None else max(self._expected - self.jitter - now, 0)

    def take(self, now: int) -> None:
        """One has come in."""
        self._expected = max(now, self._expected if self._expected is not None else now) + self.period

    def go_on_from(self, before: Bucket) -> None:
        """What was spent under another contract stays spent, as far as this one's burst goes."""
        if before._expected is not None:
            self._expected = before._expected - before.period + self.period
