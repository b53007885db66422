"""A run of tasks as one picture in a file."""

from __future__ import annotations

from pathlib import Path

from narrowboat.report.picture import save_png
from narrowboat.report.plots import tasks
from narrowboat.tasks.record import Record


def draw_tasks(record: Record, path: Path, start: float = 0.0, span: float = 2.0) -> None:
    """Draw a record to the PNG ``path``; see ``plots.tasks``.

    Args:
        record: of a run or a simulation.
        path: the file; written under a temporary name, then renamed.
        start: seconds at which the Gantt chart begins.
        span: seconds of it.

    Raises:
        UsageError: matplotlib is missing, or nothing happened in that time.
        StorageError: the file cannot be written.
    """
    save_png(tasks(record, start=start, span=span), path)
