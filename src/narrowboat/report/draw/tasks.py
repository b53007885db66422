"""A run of tasks: the Gantt chart of every task, and responses against bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrowboat.report.draw.theme import (
    ALERT,
    CYCLE,
    FAINT,
    INK,
    WIDE,
    line,
    new_figure,
    patch,
    put_legend,
    put_title,
    safe,
    styled,
)
from narrowboat.tasks.record import Record

TASK_COLOURS = tuple(colour for colour in CYCLE if colour != ALERT)
_MANY = 1_500


def task_colours(record: Record) -> dict[str, str]:
    """A colour per task, the same in every picture of the record."""
    return {name: TASK_COLOURS[k % len(TASK_COLOURS)] for k, name in enumerate(record.tasks)}


def missed(outcome: str, due: int, end: int) -> bool:
    """Whether a job of this outcome missed its deadline."""
    return outcome not in ("done", "unfinished") or (outcome == "unfinished" and due <= end)


@styled
def draw_gantt(
    record: Record,
    begin: int,
    end: int,
    names: Sequence[str],
    *,
    title: str = "",
    width: float = WIDE,
    figure: Any = None,
) -> Any:
    """One row per task: loads above computing, releases and missed deadlines.

    Args:
        record: of a run or a simulation.
        begin, end: of the picture, microseconds.
        names: of the tasks to show, from top to bottom.
        title: above the picture.
        width: inches.
        figure: to draw in, a part of a larger one say.

    Returns:
        matplotlib's Figure.
    """
    colour, row = task_colours(record), {name: k for k, name in enumerate(names)}
    figure = new_figure(width, 1.5 + 0.5 * len(names)) if figure is None else figure
    axes = figure.add_subplot()
    bars: dict[tuple[str, bool, bool], list[tuple[float, float]]] = {}
    for part in record.segments:
        if part.task in row and part.end >= begin and part.begin <= end:
            key = part.task, part.engine == "load", part.what in ("prefetch", "abort")
            bars.setdefault(key, []).append((part.begin / 1e3, max(part.end - part.begin, 1) / 1e3))
    for (task, load, beside), spans in bars.items():
        height = (row[task] - 0.36, 0.2) if load else (row[task] - 0.12, 0.48)
        style = {"hatch": "////", "edgecolor": colour[task], "facecolors": "none"} if beside else {}
        drawn = axes.broken_barh(spans, height, **(style or {"facecolors": colour[task]}))
        drawn.set_rasterized(len(spans) > _MANY)
    jobs = [job for job in record.jobs if job.task in row]
    releases = [(job.release / 1e3, row[job.task] - 0.44) for job in jobs if begin <= job.release < end]
    if releases:
        axes.plot(*zip(*releases, strict=True), "v", color=FAINT, markersize=4, clip_on=False)
    late = [
        (job.due / 1e3, row[job.task] + 0.12)
        for job in jobs
        if begin <= job.due < end and missed(job.outcome, job.due, record.end)
    ]
    if late:
        axes.plot(*zip(*late, strict=True), "X", color=ALERT, markersize=8, markeredgecolor="white", clip_on=False)
    most = 24 if width >= WIDE else 14
    axes.set_yticks(range(len(names)), [safe(name, most) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(begin / 1e3, end / 1e3)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds")
    shades: list[Any] = [
        patch(INK, "thick: computing, thin: loading"),
        patch("none", "loaded ahead or in vain", hatch="////", edgecolor=INK),
        line(FAINT, "release", marker="v", linestyle=""),
    ]
    if late:
        shades.append(line(ALERT, "deadline missed", marker="X", linestyle="", markersize=8))
    put_title(axes, title, width)
    put_legend(figure, shades, width)
    return figure


@styled
def draw_responses(record: Record, *, title: str = "", width: float = WIDE, figure: Any = None) -> Any:
    """Every response as a tick, its bound and its deadline as lines, all as shares of the deadline.

    Args:
        record: of a run or a simulation.
        title: above the picture.
        width: inches.
        figure: to draw in, a part of a larger one say.

    Returns:
        matplotlib's Figure.
    """
    names, colour, found = list(record.tasks), task_colours(record), record.responses()
    figure = new_figure(width, 1.35 + 0.36 * len(names)) if figure is None else figure
    axes = figure.add_subplot()
    for row, task in enumerate(record.tasks.values()):
        deadline = task["deadline_us"]
        times = [time / deadline for time in found.get(task["name"], [])]
        drawn = axes.plot(
            times, [row] * len(times), "|", color=colour[task["name"]], markersize=13, alpha=0.6, markeredgewidth=1.4
        )
        drawn[0].set_rasterized(len(times) > _MANY)
        if task["bound_us"] is not None:
            axes.plot([task["bound_us"] / deadline] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=2.4)
    axes.axvline(1.0, color=ALERT, linewidth=1.4, linestyle="--")
    axes.set_yticks(range(len(names)), [safe(name, 24 if width >= WIDE else 14) for name in names])
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("response / deadline")
    put_title(axes, title, width)
    handles = [
        line(FAINT, "a job", marker="|", linestyle="", markersize=11),
        line(INK, "its bound", linewidth=2.4),
        line(ALERT, "its deadline", linestyle="--"),
    ]
    put_legend(figure, handles, width)
    return figure
