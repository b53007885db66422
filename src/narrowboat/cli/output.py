"""What every command prints with: tables on stdout, progress and errors on stderr, JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_WIDTH_OF_A_FILE = 160
"""Columns to use where the output is no terminal, so that nothing is cut in a log or a pipe."""


def console() -> Console:
    """The console on stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE, emoji=False)  # "model:factory:" is a name


def error_console() -> Console:
    """The console on stderr."""
    return Console(stderr=True, emoji=False)


def print_error(message: str) -> None:
    """One line, ``error: ...``, red on a terminal, on stderr."""
    error_console().print(f"[bold red]error:[/] {escape(' '.join(message.split()))}", soft_wrap=True, highlight=False)


def print_json(data: Any) -> None:
    """``data`` as one JSON document on stdout; dataclasses, paths and dtypes are spelled out, NaN is null."""
    sys.stdout.write(json.dumps(_plain(data), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # a numpy or torch scalar
        return _plain(value.item())
    return str(value)


def make_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> Table:
    """A table with one header line; the columns named in ``right`` are aligned right."""
    table = Table(title=escape(title) or None, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """Print :func:`make_table` on stdout."""
    console().print(make_table(title, columns, rows, right=right))


def print_facts(title: str, facts: Mapping[str, object]) -> None:
    """Print names and values, one a line, with the names aligned."""
    table = Table(title=escape(title) or None, title_justify="left", title_style="bold", show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(f"[dim]{escape(name)}[/]", escape(str(value)))
    console().print(table)


@contextmanager
def progress_bar(description: str, *, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, shown on a terminal only.

    Args:
        description: what is going on, e.g. ``"packing"``.
        unit: ``"bytes"``, or anything else to count plain steps.

    Yields:
        A function to call with (done, total).
    """
    screen = error_console()
    amount = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(escape(description), total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update
