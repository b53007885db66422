"""The timeline of recent passes: from a file, and to one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narrowboat.errors import UsageError
from narrowboat.report.picture import save_png
from narrowboat.report.plots import timeline
from narrowboat.trace import LANES, Event, Trace


def read_chrome(path: str | Path) -> Trace:
    """The trace that ``Trace.save_chrome`` wrote to ``path``.

    Raises:
        UsageError: no such file, or not a trace of narrowboat's.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a trace written by narrowboat: {error}") from error
    return trace_of(document, str(path))


def trace_of(document: Any, where: str) -> Trace:
    """The same from what the file says.

    Args:
        document: read from JSON.
        where: for messages.

    Raises:
        UsageError: it is no trace of narrowboat's.
    """
    try:
        events = document["traceEvents"]
        trace = Trace(limit=max(len(events), 1))
        for raw in events:
            if raw["ph"] == "X":
                trace.add(_event(raw))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UsageError(f"{where} is not a trace written by narrowboat: {error}") from error
    return trace


def _event(raw: Mapping[str, Any]) -> Event:
    start, length, nbytes = raw["ts"] / 1e6, raw["dur"] / 1e6, raw["args"].get("bytes", 0)
    if not (math.isfinite(start) and math.isfinite(length) and 0 <= length < 1e9 and 0 <= nbytes < 1 << 60):
        raise ValueError(f"an event from {raw['ts']!r} for {raw['dur']!r}")
    worker = raw["tid"] - LANES.index(raw["cat"]) * 100
    return Event(raw["cat"], str(raw["name"]), start, start + length, nbytes, worker)


def draw_timeline(trace: Trace, path: str | Path, since: float = float("-inf"), *, title: str = "") -> None:
    """Draw the events after ``since`` to the PNG ``path``; see ``plots.timeline``.

    Args:
        trace: ``session.trace()``, or :func:`read_chrome`.
        path: the file; written under a temporary name, then renamed.
        since: seconds on the ``time.perf_counter`` clock: the beginning of the last pass or two.
        title: one line above the picture.

    Raises:
        UsageError: matplotlib is missing, or there are no events to draw.
        StorageError: the file cannot be written.
    """
    save_png(timeline(trace, since=since, title=title, width=16), Path(path))
