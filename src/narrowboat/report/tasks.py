"""A run of tasks as a picture: the engines' Gantt chart, memory over time, responses against bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrowboat.errors import UsageError
from narrowboat.quantities import format_bytes
from narrowboat.report.picture import require_matplotlib, save_png
from narrowboat.tasks.record import Record

_COLOURS = ("#3b7dd8", "#3a9d5d", "#d1495b", "#8a6d3b", "#7b5ea7", "#d98b2b", "#2a9d8f", "#8d99ae")
_MIB = 1 << 20


def draw_tasks(record: Record, path: Path, start: float = 0.0, span: float = 2.0) -> None:
    """Draw a record to the PNG ``path``.

    Args:
        record: of a run or a simulation.
        path: the file; written under a temporary name, then renamed.
        start: seconds at which the Gantt chart begins.
        span: seconds of it.

    Raises:
        UsageError: matplotlib is missing, or nothing happened in that time.
        StorageError: the file cannot be written.
    """
    figure_class = require_matplotlib()
    begin, end = start * 1e6, (start + span) * 1e6
    shown = [part for part in record.segments if part.end > begin and part.begin < end]
    if not shown:
        raise UsageError(
            f"nothing ran between {start:g} s and {start + span:g} s; the run took {record.end / 1e6:g} s"
        )
    names = list(record.tasks)
    colour = {name: _COLOURS[k % len(_COLOURS)] for k, name in enumerate(names)}
    figure = figure_class(figsize=(12, 3.2 + 0.5 * len(names)), layout="constrained")
    gantt, memory, responses = figure.subplots(3, 1, height_ratios=[1.2, 1, 0.5 + 0.3 * len(names)])
    _gantt(gantt, record, shown, colour, (begin, end))
    _memory(memory, record)
    _responses(responses, record, names, colour)
    save_png(figure, path)


def _gantt(axes: Any, record: Record, shown: list[Any], colour: dict[str, str], span: tuple[float, float]) -> None:
    rows = {"load": 0, "compute": 1}
    for part in shown:
        axes.broken_barh(
            [(part.begin / 1e3, max(part.end - part.begin, 1) / 1e3)],
            (rows[part.engine] - 0.38, 0.76),
            facecolors=colour.get(part.task, "#999999"),
            alpha=0.45 if part.what in ("prefetch", "abort") else 1.0,
        )
    for job in record.jobs:
        if span[0] <= job.release < span[1]:
            axes.plot(job.release / 1e3, 1.6, marker="v", markersize=4, color=colour[job.task], clip_on=False)
        missed = job.outcome not in ("done", "unfinished")
        if missed and span[0] <= job.due < span[1]:
            axes.plot(job.due / 1e3, 1.6, marker="x", markersize=6, color="#c1121f", clip_on=False)
    axes.set_yticks([0, 1], ["load", "compute"])
    axes.set_ylim(-0.6, 1.7)
    axes.set_xlim(span[0] / 1e3, span[1] / 1e3)
    axes.set_xlabel("milliseconds; a triangle is a release, a cross a missed deadline", fontsize=8)
    handles = [axes.plot([], [], color=c, linewidth=6, label=name)[0] for name, c in colour.items()]
    axes.legend(handles=handles, ncols=min(len(handles), 6), fontsize=8, loc="lower right", frameon=False)


def _memory(axes: Any, record: Record) -> None:
    times = [when / 1e6 for when, _ in record.memory] or [0.0]
    held = [nbytes / _MIB for _, nbytes in record.memory] or [0.0]
    budgets = [stretch.setup["budget_bytes"] for stretch in record.stretches()]
    budget, starts = max(budgets), [0.0, *(change.end / 1e6 for change in record.changes)]
    axes.step([*times, record.end / 1e6], [*held, held[-1]], where="post", color="#3b7dd8", linewidth=1)
    lines = [nbytes / _MIB for nbytes in (*budgets, budgets[-1])]
    axes.step([*starts, record.end / 1e6], lines, where="post", color="#c1121f", linewidth=1, linestyle="--")
    axes.text(0, budget / _MIB, f" budget {format_bytes(budget)}", va="bottom", fontsize=8, color="#c1121f")
    axes.set_ylim(0, budget / _MIB * 1.2)
    axes.set_ylabel("MiB", fontsize=8)
    axes.set_xlabel("seconds", fontsize=8)


def _responses(axes: Any, record: Record, names: list[str], colour: dict[str, str]) -> None:
    """Every response as a dot, its bound and its deadline as lines, all as shares of the deadline."""
    found = record.responses()
    for row, task in enumerate(record.tasks.values()):
        deadline = task["deadline_us"]
        times = [time / deadline for time in found.get(task["name"], [])]
        axes.plot(times, [row] * len(times), "|", color=colour[task["name"]], markersize=10, alpha=0.5)
        if task["bound_us"] is not None:
            axes.plot([task["bound_us"] / deadline] * 2, [row - 0.35, row + 0.35], color="#222222", linewidth=2)
    axes.axvline(1.0, color="#c1121f", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("response / deadline: a tick per job, black the bound, red the deadline", fontsize=8)
