"""Run one subject in a child process, under a memory limit that the kernel enforces and a time limit."""

from __future__ import annotations

import contextlib
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrowboat.checkpoint import open_index
from narrowboat.errors import BudgetError, ModelError, NarrowboatError
from narrowboat.machine.cgroup import MemoryCgroup, writable_memory_cgroup
from narrowboat.machine.memory import process_memory
from narrowboat.machine.pagecache import drop_cached

SLACK = 64 << 20
"""Bytes the limit grants over baseline and budget: page tables, and pages of libraries the kernel drops and reads
again. The same for every subject."""

_READY_SECONDS = 120.0


@dataclass(frozen=True)
class Task:
    """What a child is to run.

    Attributes:
        subject: one of ``demo.subjects.SUBJECTS``.
        model: ``package.module:factory``.
        weights: the weights file.
        passes: how many.
        budget: bytes, for subjects that know one.
        limit: bytes over its baseline (before :data:`SLACK`) that the kernel lets it take; None for no limit.
        seconds: time limit from the model's name on; None for none.
        grace: seconds after which a pass that is under way at the time limit is cut off.
        input: an image or array; None for the model's example.
        trace: narrowboat only: where to write a trace of the last two passes.
        cold: drop the weights from the page cache first.
    """

    subject: str
    model: str
    weights: Path
    passes: int = 5
    budget: int | None = None
    limit: int | None = None
    seconds: float | None = None
    grace: float = 3.0
    input: Path | None = None
    trace: Path | None = None
    cold: bool = True


@dataclass
class Outcome:
    """What a child measured, as far as it came.

    Attributes:
        task: what it was to run.
        first_answer_ms: from the model's name to its first output; None if it came to none.
        latency_ms: of the passes that ended.
        bytes_read: from storage, per pass.
        peak_bytes: over its baseline; None if it never was ready.
        digests: of the first output and, if it came to its end, of the last.
        limited: whether the kernel held it to the limit.
        stopped_after: seconds after which it was stopped; None if it ended by itself.
        killed: it was stopped in the middle of a pass.
        failure: what went wrong, in words; empty if nothing did.
        details: what only this subject tells.
    """

    task: Task
    first_answer_ms: float | None = None
    latency_ms: list[float] = field(default_factory=list)
    bytes_read: list[int | None] = field(default_factory=list)
    peak_bytes: int | None = None
    digests: set[str] = field(default_factory=set)
    limited: bool = False
    stopped_after: float | None = None
    killed: bool = False
    failure: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def steady_ms(self) -> float | None:
        """Median of the passes after the first two (after the first of up to three); None without any pass."""
        skip = 2 if len(self.latency_ms) > 3 else 1
        passes = self.latency_ms[skip:] or self.latency_ms
        return statistics.median(passes) if passes else None

    @property
    def unfinished_ms(self) -> float | None:
        """How long the pass (or the loading) had run that was cut off by the time limit; None if none was."""
        if not self.killed or self.stopped_after is None:
            return None
        return self.stopped_after * 1e3 - (self.first_answer_ms or 0.0) - sum(self.latency_ms[1:])

    @property
    def steady_read(self) -> int | None:
        """Median bytes read by the same passes; None where the kernel hides it."""
        skip = 2 if len(self.bytes_read) > 3 else 1
        known = [nbytes for nbytes in self.bytes_read[skip:] or self.bytes_read if nbytes is not None]
        return int(statistics.median(known)) if known else None


def why_unlimited() -> str | None:
    """None where children can be held to a memory limit; otherwise the reason why not."""
    return writable_memory_cgroup()


def run_child(task: Task, *, on_pass: Callable[[int, float], None] = lambda number, latency_ms: None) -> Outcome:
    """Run a task to its end, or to its time limit, and return what it measured.

    The child warms up outside any limit; then it is moved into a memory cgroup whose limit is ``task.limit`` and
    :data:`SLACK`. What it held before stays charged where it was, so that the limit is over its own baseline exactly.

    Args:
        task: what to run.
        on_pass: called after each pass with its number and milliseconds.

    Raises:
        BudgetError, NarrowboatError: narrowboat refused the task, with its own message.
    """
    files = open_index(task.weights).files
    outcome = Outcome(task)
    with contextlib.ExitStack() as stack:
        group: MemoryCgroup | None = None
        if task.limit is not None and why_unlimited() is None:
            group = stack.enter_context(MemoryCgroup(task.limit + SLACK))
            outcome.limited = True
        child = _Child(task)
        stack.callback(child.end)
        if child.wait_ready(_READY_SECONDS) is None:
            _explain(outcome, child, group)
            return outcome
        if group is not None:
            group.add(child.process.pid)
        for path in files if task.cold else ():
            drop_cached(path)
        child.release()
        _follow(child, outcome, on_pass)
        _explain(outcome, child, group)
    return outcome


class _Child:
    """The process, and the events it tells as they come."""

    def __init__(self, task: Task) -> None:
        command = [
            sys.executable, "-m", "narrowboat.demo.subjects", task.subject, "--json", "--hold",
            "--model", task.model, "--weights", str(task.weights), "--passes", str(task.passes),
        ]  # fmt: skip
        for name, value in (
            ("--budget", task.budget),
            ("--seconds", task.seconds),
            ("--input", task.input),
            ("--trace", task.trace),
        ):
            if value is not None:
                command += [name, str(value)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.baseline = 0
        self.result: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.other: list[str] = []  # lines that are no events: warnings, a traceback
        self.killed = False
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._readers = [
            threading.Thread(target=self._read_events, daemon=True),
            threading.Thread(target=self._read_result, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read_events(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and "event" in event:
                self._events.put(event)
            elif line.strip():
                self.other.append(line.rstrip())
        self._events.put(None)

    def _read_result(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                self.result = json.loads(line)

    def next_event(self, timeout: float | None) -> dict[str, Any] | None:
        """The next event; None if the child has ended. Raises queue.Empty after ``timeout`` seconds."""
        event = self._events.get(timeout=timeout)
        if event is not None and event["event"] == "error":
            self.error = event
            return self.next_event(timeout)
        return event

    def wait_ready(self, seconds: float) -> int | None:
        """Wait until it has warmed up; its baseline in bytes, or None if it ended instead."""
        with contextlib.suppress(queue.Empty):
            event = self.next_event(seconds)
            if event is not None:
                self.baseline = int(event["baseline_bytes"])
                return self.baseline
        return None

    def release(self) -> None:
        """Let it begin."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: the events will say so
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        self.killed = True
        self.process.kill()

    def end(self) -> None:
        """See to it that the process has ended and its pipes are read to their end."""
        if self.process.poll() is None:
            self.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(timeout=5)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def _follow(child: _Child, outcome: Outcome, on_pass: Callable[[int, float], None]) -> None:
    """Take in what the child measures until it ends or its time is over."""
    limit = outcome.task.seconds
    begun = time.monotonic()
    while True:
        left = None if limit is None else max(begun + limit + outcome.task.grace - time.monotonic(), 0.0)
        try:
            event = child.next_event(left)
        except queue.Empty:
            with contextlib.suppress(NarrowboatError):
                outcome.peak_bytes = max(process_memory(child.process.pid).hwm - child.baseline, 0)
            outcome.stopped_after, outcome.killed = time.monotonic() - begun, True
            child.kill()
            return
        if event is None:
            return
        outcome.latency_ms.append(event["latency_ms"])
        outcome.bytes_read.append(event["bytes_read"])
        outcome.first_answer_ms = event["first_answer_ms"]
        outcome.peak_bytes = event["peak_bytes"]
        if event["output_digest"] is not None:
            outcome.digests.add(event["output_digest"])
        on_pass(len(outcome.latency_ms), event["latency_ms"])


def _explain(outcome: Outcome, child: _Child, group: MemoryCgroup | None) -> None:
    """After the last event: the result, or why there is none."""
    oom_kills = group.oom_kills() if group is not None and not child.killed else 0
    child.end()
    if child.result is not None:
        outcome.peak_bytes = child.result["peak_bytes"]
        outcome.digests.add(child.result["output_digest"])
        outcome.details = child.result["details"]
        if child.result["stopped"]:
            outcome.stopped_after = outcome.task.seconds
        return
    if outcome.stopped_after is not None:
        return
    if child.error is not None:
        if child.error["type"] == "BudgetError":
            raise BudgetError(child.error["message"], minimum=child.error["minimum"], limiter=child.error["limiter"])
        outcome.failure = child.error["message"]
    elif oom_kills or (group is not None and group.oom_kills()):
        outcome.failure = "killed by the kernel at the memory limit"
    else:
        last = child.other[-1] if child.other else f"exit code {child.process.returncode}"
        outcome.failure = f"ended early: {last}"
    if outcome.task.subject == "narrowboat":
        raise ModelError(f"the narrowboat process failed: {outcome.failure}")
