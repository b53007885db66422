"""The timeline of a pass: what was read, computed and waited for, when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrowboat.quantities import format_bytes
from narrowboat.report.draw.theme import (
    CHANGE,
    COMPUTE,
    ON_COLOUR,
    ON_STALL,
    READ,
    STALL,
    WIDE,
    new_figure,
    patch,
    put_legend,
    put_title,
    safe,
    styled,
)
from narrowboat.trace import LANES, Event

COLOURS = {"read": READ, "compute": COMPUTE, "stall": STALL, "budget": CHANGE}
TITLES = {"read": "reads", "compute": "compute", "stall": "stalls", "budget": "budget"}
_LABEL_POINTS = 7.0
_MANY = 1_500  # bars from which on a vector picture would be larger than pixels


@styled
def draw_events(events: Sequence[Event], origin: float, *, title: str = "", width: float = WIDE) -> Any:
    """Reads, one row per reader thread, computing and stalls over milliseconds.

    Args:
        events: at least one.
        origin: seconds that count as nothing; what happened before is cut off.
        title: above the picture.
        width: inches.

    Returns:
        matplotlib's Figure.
    """
    span = max(event.end for event in events) - origin
    rows = _rows(events)
    figure = new_figure(width, 1.5 + 0.42 * len(rows))
    axes = figure.add_subplot()
    points = (width - 1.2) * 72  # between left and right end of the axes, about
    for (lane, worker), row in rows.items():
        mine = [event for event in events if (event.lane, event.worker) == (lane, worker)]
        bars = [((max(e.start, origin) - origin) * 1e3, (e.end - max(e.start, origin)) * 1e3) for e in mine]
        edge = "white" if len(mine) <= 60 else "none"
        drawn = axes.broken_barh(bars, (row - 0.42, 0.84), facecolors=COLOURS[lane], edgecolors=edge, linewidth=0.3)
        drawn.set_rasterized(len(mine) > _MANY)
        for name, start, end in _labelled(mine, origin):
            room = points * (end - start) / span if span else 0.0
            _label(axes, name, (start + end - 2 * origin) * 500, row, room, lane)
    axes.set_yticks(list(rows.values()), [_row_title(lane, worker, rows) for lane, worker in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, span * 1e3 or 1)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds")
    put_title(axes, title, width)
    put_legend(figure, _handles(events, origin), width)
    return figure


def _rows(events: Sequence[Event]) -> dict[tuple[str, int], int]:
    """One row per reader thread, one for computing, one for stalls, from top to bottom."""
    keys = {(event.lane, event.worker) for event in events} | {("read", 0), ("compute", 0), ("stall", 0)}
    return {key: row for row, key in enumerate(sorted(keys, key=lambda key: (LANES.index(key[0]), key[1])))}


def _row_title(lane: str, worker: int, rows: dict[tuple[str, int], int]) -> str:
    several = sum(key[0] == lane for key in rows) > 1
    return f"{TITLES[lane]} {worker + 1}" if several else TITLES[lane]


def _labelled(events: Sequence[Event], origin: float) -> list[tuple[str, float, float]]:
    """``(name, start, end)`` of neighbouring events of one name taken together: a block is read in many pieces."""
    runs: list[tuple[str, float, float]] = []
    for event in sorted(events, key=lambda e: e.start):
        start = max(event.start, origin)
        if runs and runs[-1][0] == event.name and start - runs[-1][2] < 0.5e-3:
            runs[-1] = (event.name, runs[-1][1], event.end)
        else:
            runs.append((event.name, start, event.end))
    return runs


def _label(axes: Any, name: str, middle: float, row: int, room: float, lane: str) -> None:
    """Write the name where it fits: across, else upright, else not at all; ``room`` in points."""
    if room < _LABEL_POINTS * 1.5 or not name:
        return
    shown = safe(name, 16)
    upright = room < len(shown) * _LABEL_POINTS * 0.6
    axes.text(
        middle,
        row,
        shown,
        ha="center",
        va="center",
        rotation=90 if upright else 0,
        fontsize=_LABEL_POINTS - 2 * upright,
        color=ON_STALL if lane == "stall" else ON_COLOUR,
        clip_on=True,
    )


def _handles(events: Sequence[Event], origin: float) -> list[Any]:
    handles = []
    for lane in LANES:
        mine = [event for event in events if event.lane == lane]
        if not mine and lane == "budget":
            continue
        busy = covered([(max(e.start, origin), e.end) for e in mine]) * 1e3
        nbytes = sum(event.nbytes for event in mine) if lane == "read" else 0
        text = f"{TITLES[lane]} {busy:,.0f} ms" if busy >= 10 else f"{TITLES[lane]} {busy:.1f} ms"
        handles.append(patch(COLOURS[lane], f"{text}, {format_bytes(nbytes)}" if nbytes else text))
    return handles


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
