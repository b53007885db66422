"""A progress bar over what a map delivers."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any


def counted(outputs: Generator[Any, None, None], total: int | None) -> Generator[Any]:
    """``outputs``, with a bar on stderr that counts them.

    Args:
        total: how many there will be; None if nobody knows.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with contextlib.closing(outputs), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("inputs", total=total)
        for output in outputs:
            yield output
            bar.advance(task)
