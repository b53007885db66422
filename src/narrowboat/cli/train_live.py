"""What ``narrowboat train`` shows while it trains, and how a signal ends it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from narrowboat.cli.output import error_console
from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.train.plan import TrainPlan
from narrowboat.train.recipes.loop import Listener, Score
from narrowboat.train.report import StepRecord

_EVERY = 10.0  # seconds between lines where the output is no terminal


@contextmanager
def stop_asked() -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM; the second Ctrl-C interrupts as ever."""
    asked = threading.Event()

    def ask(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    usual = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class TrainView:
    """Two bars on a terminal, steps and memory; elsewhere a line now and then; on stderr."""

    def __init__(self, stop: threading.Event, bars: Progress, *, quiet: bool) -> None:
        self._bars, self._quiet = bars, quiet
        self._ids: tuple[TaskID, TaskID] | None = None
        self._total = 0
        self._told = time.monotonic()
        self.listener = Listener(step=self._step, score=self._scored, stop=stop.is_set)

    def tell(self, said: str) -> None:
        """One line."""
        if not self._quiet:
            self._bars.console.print(said, markup=False, highlight=False, soft_wrap=True)

    def planned(self, plan: TrainPlan, steps: int) -> None:
        """The first step is about to begin."""
        self._total = steps
        self.tell(
            f"plan: {plan.parts} micro-batch{'es' if plan.parts > 1 else ''} of {plan.micro_batch}, "
            f"{format_bytes(plan.predicted_peak)} at most, {plan.predicted_slowdown:.2f} times the plain step's time"
        )
        self._ids = (
            self._bars.add_task("training", total=steps, told=""),
            self._bars.add_task("memory", total=plan.budget, told=""),
        )

    def _step(self, number: int, record: StepRecord) -> None:
        memory = f"{format_bytes(record.measured_peak)} of {format_bytes(record.budget)}"
        told = f"step {number} of {self._total}  loss {record.loss:.4g}  {format_seconds(record.seconds)}"
        if self._ids is not None:
            self._bars.update(self._ids[0], completed=number, told=told)
            self._bars.update(self._ids[1], completed=record.measured_peak, total=record.budget, told=memory)
        if self._bars.disable and time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            self.tell(f"{told}  {memory}")

    def _scored(self, score: Score) -> None:
        self.tell(f"step {score.step} of {self._total}: validation loss {score.loss:.4g}, {score.accuracy:.1%} right")


@contextmanager
def live_view(stop: threading.Event, *, quiet: bool) -> Iterator[TrainView]:
    """What a run is to tell of itself; nothing is shown if ``quiet``."""
    screen = error_console()
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[told]}"))
    with Progress(*columns, console=screen, transient=True, disable=quiet or not screen.is_terminal) as bars:
        yield TrainView(stop, bars, quiet=quiet)
