"""What the parts share: one child after the other, each noted under its key, until the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_kit.bounds import best_rate
from cuda_kit.children import Children, Outcome
from cuda_kit.effort import Effort
from cuda_kit.results import Results

_GRACE = 45.0  # seconds that a child may go on after the end of the time

Record = dict[str, Any]
Arguments = dict[str, Any]


class PartFailedError(Exception):
    """A part cannot go on; the others can."""


@dataclass(slots=True)
class Campaign:
    """One run of the benchmark.

    Attributes:
        device: as on the command line.
        small: the small shapes.
        effort: how much.
        work: folder for what is made.
        fast: folder in memory for weights that are read often; ``work`` where there is none.
        results: the file.
        children: who runs them.
        say: tells a person what goes on.
        ends: when the time is over, by ``time.monotonic()``.
    """

    device: str
    small: bool
    effort: Effort
    work: Path
    fast: Path
    results: Results
    children: Children
    say: Callable[[str], None]
    ends: float

    @property
    def is_cuda(self) -> bool:
        """A GPU, and not an emulated device."""
        return self.device.startswith("cuda")

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def cap(self, timeout: float) -> float:
        """So many seconds for a child, and not much more than are left."""
        return min(timeout, max(self.left(), 0.0) + _GRACE)

    def measure(
        self,
        key: str,
        call: str,
        arguments: Callable[[], Arguments],
        told: Callable[[Outcome], Record],
        *,
        timeout: float,
        about: Record | None = None,
    ) -> Record:
        """Run a child and note what it told, unless that is known.

        Args:
            key: of the record.
            call: see ``Children.run``.
            arguments: made when they are needed.
            told: from what came of it to what is recorded; only asked where the child told anything.
            timeout: seconds.
            about: what is recorded in any case.
        """
        if self.results.has(key):
            return self.results.records[key]
        if self.left() <= 0:
            return self.results.put(key, {**(about or {}), "status": "not run", "detail": "no time was left"})
        given = arguments()
        outcome = self.children.run(key, call, given, timeout=self.cap(timeout))
        record = {**(about or {}), "status": outcome.status, "detail": outcome.detail}
        record |= {"child_seconds": round(outcome.seconds, 2)}
        record |= told(outcome) if outcome.events else {}
        self.say(line(key, record))
        return self.results.put(key, record)

    def rate(self, way: str) -> float:
        """Bytes per second between pinned memory and the device: ``"in"`` or ``"out"``.

        Raises:
            PartFailedError: it could not be measured.
        """
        record = self.results.get("copies")
        if record is None:
            raise PartFailedError("the bandwidth between host and device is not known")
        return best_rate(record[way])


def line(key: str, record: Record) -> str:
    """One line on the screen."""
    parts = [f"{key:44s} {record['status']:8s} {record.get('child_seconds', 0):6.1f} s"]
    for batch in record.get("batches", ()):
        good = batch["status"] == "ok"
        parts.append(f"{batch['batch']}: " + (f"{batch['median_s'] * 1e3:.1f} ms" if good else batch["status"]))
    if record["detail"]:
        parts.append(record["detail"][:120])
    return "  ".join(parts)
