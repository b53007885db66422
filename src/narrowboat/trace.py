"""What happened when: reads, computing and stalls of recent passes, for people and for Perfetto."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

LANES = ("read", "compute", "stall", "budget")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that took time.

    Attributes:
        lane: ``"read"``, ``"compute"``, ``"stall"``, or ``"budget"`` for a change of budget.
        name: the block or step.
        start, end: seconds on the ``time.perf_counter`` clock.
        nbytes: bytes moved, for reads; the new budget, for its changes.
        worker: number of the reader thread, for reads.
    """

    lane: str
    name: str
    start: float
    end: float
    nbytes: int = 0
    worker: int = 0


class Trace:
    """The events of the last passes, oldest first; older ones are dropped so that memory stays bounded."""

    def __init__(self, limit: int = 4_000) -> None:
        self._events: deque[Event] = deque(maxlen=limit)

    def add(self, event: Event) -> None:
        """Append one event (any thread)."""
        self._events.append(event)

    def events(self, since: float = float("-inf")) -> list[Event]:
        """Events that end after ``since``."""
        return [event for event in list(self._events) if event.end > since]

    def save_chrome(
        self, path: str | Path, since: float = float("-inf"), about: Mapping[str, object] | None = None
    ) -> None:
        """Write Chrome/Perfetto trace JSON (open in ui.perfetto.dev); temporary name, then renamed.

        Args:
            path: the file.
            since: leave out events that end before.
            about: who made it, on which machine; put beside the events.
        """
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        document: dict[str, object] = {"traceEvents": list(_chrome(self.events(since)))}
        if about is not None:
            document["otherData"] = dict(about)
        temporary.write_text(json.dumps(document))
        os.replace(temporary, path)


def _chrome(events: Iterable[Event]) -> Iterable[dict[str, object]]:
    for lane, name in enumerate(LANES):
        yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": lane * 100, "args": {"name": name}}
    for event in events:
        yield {
            "ph": "X",
            "pid": 1,
            "tid": LANES.index(event.lane) * 100 + event.worker,
            "name": event.name,
            "cat": event.lane,
            "ts": event.start * 1e6,
            "dur": (event.end - event.start) * 1e6,
            "args": {"bytes": event.nbytes} if event.nbytes else {},
        }
