"""Child processes: forked from one process that has imported everything and computed nothing.

A fork spares every child the seconds of importing, and gives all of them the same memory to start from. The parent
must never run an OpenMP region: libgomp does not survive a fork after that.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference_kit.text_pages import Range, populate, resident_text
from narrowboat.machine.cgroup import MemoryCgroup

_PR_SET_PDEATHSIG = 1

Emit = Callable[..., None]


@dataclass(slots=True)
class Outcome:
    """What a child told, and how it ended.

    Attributes:
        events: the lines it wrote, in order; what came before a kill is kept.
        status: ``"ok"``, ``"oom"``, ``"timeout"`` or ``"error"``.
        detail: the error in one line.
        seconds: wall time of the child.
        charged_peak: the most bytes charged to its memory cgroup, page cache included; None without one.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    status: str = "ok"
    detail: str = ""
    seconds: float = 0.0
    charged_peak: int | None = None

    def event(self, kind: str) -> dict[str, Any] | None:
        """The last event of that kind."""
        return next((e for e in reversed(self.events) if e["event"] == kind), None)


def run_child(
    body: Callable[[Emit], None], *, log: Path, timeout: float, group: MemoryCgroup | None = None
) -> Outcome:
    """Fork, enter ``group``, run ``body(emit)``, and wait at most ``timeout`` seconds.

    Args:
        body: writes what it finds with ``emit(kind, **values)``, at once, so that a kill loses nothing.
        log: file for the events; the child's own output goes beside it.
        timeout: seconds after which the child is killed.
        group: the memory cgroup to run in.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    sys.stdout.flush()
    start = time.perf_counter()
    parent = os.getpid()
    text = resident_text()
    pid = os.fork()
    if pid == 0:
        _child(body, log, group, parent, text)
    handle = os.pidfd_open(pid)
    try:
        ended, _, _ = select.select([handle], [], [], timeout)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        _, code = os.waitpid(pid, 0)
        os.close(handle)
    lines = log.read_text().splitlines()
    # A kill can cut the last line short.
    outcome = Outcome([json.loads(line) for line in lines if line.endswith("}")])
    outcome.seconds = time.perf_counter() - start
    if group is not None:
        outcome.charged_peak = group.peak()
    failure = outcome.event("error")
    if not ended:
        outcome.status, outcome.detail = "timeout", f"stopped after {timeout:.0f} s"
    elif group is not None and group.oom_kills():
        outcome.status, outcome.detail = "oom", "killed by the kernel for passing the memory limit"
    elif failure is not None:
        outcome.status, outcome.detail = "error", failure["message"]
    elif code:
        outcome.status, outcome.detail = "error", f"ended with wait status {code}"
    return outcome


def _child(
    body: Callable[[Emit], None], log: Path, group: MemoryCgroup | None, parent: int, text: list[Range]
) -> None:
    """Run ``body`` and end the process; never returns."""
    code = 1
    try:
        if group is not None:
            group.enter()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        populate(text)
        output = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        lines = os.open(log, os.O_WRONLY | os.O_APPEND)

        def emit(kind: str, **values: Any) -> None:
            os.write(lines, (json.dumps({"event": kind, **values}) + "\n").encode())

        try:
            body(emit)
            code = 0
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".replace("\n", " ")
            emit("error", message=said[:400], minimum=getattr(error, "minimum", None))
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)
