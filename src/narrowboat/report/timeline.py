"""The timeline of a pass as a picture: what was read, computed and waited for, when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from narrowboat.errors import UsageError
from narrowboat.quantities import format_bytes
from narrowboat.report.picture import require_matplotlib, save_png
from narrowboat.trace import LANES, Event, Trace

_COLOURS = {"read": "#3b7dd8", "compute": "#3a9d5d", "stall": "#d1495b", "budget": "#8a6d3b"}
_TITLES = {"read": "reads", "compute": "compute", "stall": "stalls", "budget": "budget"}
_DPI = 110
_LABEL_POINTS = 7.5


def read_chrome(path: str | Path) -> Trace:
    """The trace that ``Trace.save_chrome`` wrote to ``path``.

    Raises:
        UsageError: no such file, or not a trace of narrowboat's.
    """
    trace = Trace()
    try:
        for raw in json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]:
            if raw["ph"] != "X":
                continue
            start = raw["ts"] / 1e6
            trace.add(
                Event(
                    raw["cat"],
                    raw["name"],
                    start,
                    start + raw["dur"] / 1e6,
                    raw["args"].get("bytes", 0),
                    raw["tid"] - LANES.index(raw["cat"]) * 100,
                )
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a trace written by narrowboat: {error}") from error
    return trace


def draw_timeline(trace: Trace, path: str | Path, since: float = float("-inf"), *, title: str = "") -> None:
    """Draw the events after ``since`` to the PNG ``path``: reads, compute and stalls over time in milliseconds.

    Args:
        trace: ``session.trace()``, or :func:`read_chrome`.
        path: the file; written under a temporary name, then renamed.
        since: seconds on the ``time.perf_counter`` clock: the beginning of the last pass or two.
        title: one line above the picture.

    Raises:
        UsageError: matplotlib is missing, or there are no events to draw.
        StorageError: the file cannot be written.
    """
    figure_class = require_matplotlib()
    events = trace.events(since)
    if not events:
        raise UsageError("there is nothing to draw: no pass has run since the given moment")
    origin = max(since, min(event.start for event in events))
    span = max(event.end for event in events) - origin
    figure = figure_class(figsize=(16, 5), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    rows = _rows(events)
    width = figure.get_figwidth() * 0.92 * 72  # points between left and right end of the axes, about
    for (lane, worker), row in rows.items():
        mine = [event for event in events if (event.lane, event.worker) == (lane, worker)]
        bars = [((max(e.start, origin) - origin) * 1e3, (e.end - max(e.start, origin)) * 1e3) for e in mine]
        axes.broken_barh(bars, (row - 0.42, 0.84), facecolors=_COLOURS[lane], edgecolors="white", linewidth=0.3)
        for name, start, end in _labelled(mine, origin):
            _label(axes, name, (start - origin) * 1e3, (end - origin) * 1e3, row, points=width * (end - start) / span)
    axes.set_yticks(list(rows.values()), [_row_title(lane, worker, rows) for lane, worker in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, span * 1e3)
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    _legend(axes, events, origin)
    save_png(figure, Path(path))


def _rows(events: list[Event]) -> dict[tuple[str, int], int]:
    """One row per reader thread, one for computing, one for stalls, from top to bottom."""
    keys = {(event.lane, event.worker) for event in events} | {("read", 0), ("compute", 0), ("stall", 0)}
    return {key: row for row, key in enumerate(sorted(keys, key=lambda key: (LANES.index(key[0]), key[1])))}


def _row_title(lane: str, worker: int, rows: dict[tuple[str, int], int]) -> str:
    several = sum(key[0] == lane for key in rows) > 1
    return f"{_TITLES[lane]} {worker + 1}" if several else _TITLES[lane]


def _labelled(events: list[Event], origin: float) -> list[tuple[str, float, float]]:
    """``(name, start, end)`` of neighbouring events of one name taken together: a block is read in many pieces."""
    runs: list[tuple[str, float, float]] = []
    for event in sorted(events, key=lambda e: e.start):
        start = max(event.start, origin)
        if runs and runs[-1][0] == event.name and start - runs[-1][2] < 0.5e-3:
            runs[-1] = (event.name, runs[-1][1], event.end)
        else:
            runs.append((event.name, start, event.end))
    return runs


def _label(axes: Any, name: str, start: float, end: float, row: int, *, points: float) -> None:
    """Write the name where it fits: across, else upright, else not at all."""
    across = len(name) * _LABEL_POINTS * 0.6
    if points < _LABEL_POINTS * 1.5:
        return
    upright = points < across
    shown = name if len(name) <= 16 else "…" + name[-15:]
    axes.text(
        (start + end) / 2,
        row,
        shown,
        ha="center",
        va="center",
        rotation=90 if upright else 0,
        fontsize=_LABEL_POINTS if not upright else _LABEL_POINTS - 1.5,
        color="white",
        clip_on=True,
    )


def _legend(axes: Any, events: list[Event], origin: float) -> None:
    from matplotlib.patches import Patch

    handles = []
    for lane in LANES:
        mine = [event for event in events if event.lane == lane]
        busy = _covered([(max(e.start, origin), e.end) for e in mine]) * 1e3
        nbytes = sum(event.nbytes for event in mine)
        text = f"{_TITLES[lane]} {busy:,.0f} ms" if busy >= 10 else f"{_TITLES[lane]} {busy:.1f} ms"
        handles.append(Patch(color=_COLOURS[lane], label=f"{text}, {format_bytes(nbytes)}" if nbytes else text))
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
