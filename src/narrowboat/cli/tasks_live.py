"""What ``narrowboat tasks run`` shows while it runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.live import Live

from narrowboat.cli.output import error_console, make_table
from narrowboat.errors import NarrowboatError
from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.tasks.live import LiveRun
from narrowboat.tasks.record import Record
from narrowboat.tasks.task_set import TaskSet

_LOOK = 0.2  # seconds between looks at what was asked for


@contextmanager
def hangups() -> Iterator[threading.Event]:
    """Set when signal HUP comes; also before the run has begun, for when it has."""
    asked = threading.Event()
    usual = signal.signal(signal.SIGHUP, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGHUP, usual)


def follow(live: LiveRun, file: Path, asked: threading.Event) -> Record:
    """The record of a run once it has ended; Ctrl-C ends it early.

    Args:
        live: the run.
        file: is read again, for other tasks or another budget, when
        asked: is set.
    """
    while True:
        try:
            if asked.is_set():
                asked.clear()
                _change(live, file)
            return live.wait(_LOOK)
        except TimeoutError:
            continue
        except KeyboardInterrupt:
            live.stop()


def _change(live: LiveRun, file: Path) -> None:
    screen = error_console()
    try:
        verdict = live.change(TaskSet.load(file))
    except NarrowboatError as error:
        screen.print(f"{file}: not changed: {error}", highlight=False, soft_wrap=True)
    else:
        used = f"{format_bytes(verdict.needed_bytes)} of {format_bytes(verdict.budget)}"
        screen.print(f"{file}: changed: {len(verdict.tasks)} tasks, {used}", highlight=False, soft_wrap=True)


@contextmanager
def live_view(task_set: TaskSet, *, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what a run is to call with every picture; on stderr, and only where that is a terminal.

    Args:
        task_set: what runs; its progress is told too.
        quiet: show nothing.
    """
    screen = error_console()
    if quiet or not screen.is_terminal:
        if not quiet:
            task_set.tell = lambda said: screen.print(said, highlight=False)
        yield lambda picture: None
        return
    with Live(console=screen, refresh_per_second=8, transient=True) as live:
        task_set.tell = lambda said: live.update(said)
        yield lambda picture: live.update(_table(task_set, picture))


def _table(task_set: TaskSet, picture: dict[str, Any]) -> Any:
    busy = picture["busy"]
    title = (
        f"{format_seconds(picture['now_us'] / 1e6)}  computing {busy['compute']:.0%}  loading {busy['load']:.0%}  "
        f"{format_bytes(picture['held_bytes'])} of {format_bytes(picture['budget_bytes'])}  "
        + "  ".join(f"{engine}: {what}" for engine, what in picture["doing"].items())
    )
    rows = []
    for name in dict.fromkeys([*(spec.name for spec in task_set.settings.tasks), *picture["tasks"]]):
        told = picture["tasks"].get(name, {})
        least = told.get("slack_us")
        rows.append(
            (
                name,
                str(told.get("done", 0)),
                str(told.get("missed", 0)),
                "" if least is None else format_seconds(least / 1e6),
                format_bytes(told.get("held_bytes", 0)),
            )
        )
    return make_table(title, ["task", "done", "missed", "least slack", "holds"], rows, right=["done", "missed"])
