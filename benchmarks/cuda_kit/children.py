"""Child processes on a device: forked from a parent that never touches it, or started anew where that cannot be.

A fork spares a child the seconds of importing. CUDA does not survive one, so the parent asks nothing of CUDA, and
looks at the device's memory through NVML, which needs no context. While a child runs, the parent samples that memory.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_SAMPLE_EVERY = 0.005  # seconds
_SHOWN = 400  # characters of an error

Emit = Callable[..., None]
Used = Callable[[], int | None]

# By the name of the error, or the beginning of its message: how a child ended.
_STATES = {
    "OutOfMemoryError": "oom",
    "DeviceMemoryError": "oom",
    "PinnedMemoryError": "oom",
    "MemoryError": "oom",
    "BudgetError": "refused",
    "ModuleNotFoundError": "not installed",
    "NotAvailable": "not available",
}


class NotAvailable(Exception):  # noqa: N818 - what a report says of it
    """There is no such thing here to be measured."""


def state_of(error: BaseException) -> str:
    """How a child ended, by what it died of: ``"oom"``, ``"refused"``, ``"not installed"``, or ``"error"``."""
    if "out of memory" in str(error) or "ALLOC_FAILED" in str(error):
        return "oom"
    return _STATES.get(type(error).__name__, "error")


def one_line(error: BaseException) -> str:
    """An error in one line, not too long."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_SHOWN]


@dataclass(slots=True)
class Outcome:
    """What a child told, and how it ended.

    Attributes:
        events: what it emitted, in order; what came before a kill is kept. ``at`` is ``time.monotonic()``.
        status: ``"ok"``, ``"timeout"``, or as ``state_of``.
        detail: the error in one line.
        seconds: wall time of the child.
        before: bytes of the device in use before it; None where nobody can tell.
        samples: (time, bytes in use) while it ran.
    """

    events: list[dict[str, Any]] = field(default_factory=list)
    status: str = "ok"
    detail: str = ""
    seconds: float = 0.0
    before: int | None = None
    samples: list[tuple[float, int]] = field(default_factory=list)

    def event(self, kind: str) -> dict[str, Any] | None:
        """The last event of that kind."""
        return next((e for e in reversed(self.events) if e["event"] == kind), None)

    def peak(self, begin: float | None = None, end: float | None = None) -> int | None:
        """Most bytes that the child had of the device between two times, seen from outside; None if nobody looked."""
        if self.before is None:
            return None
        seen = [n for at, n in self.samples if (begin is None or at >= begin) and (end is None or at <= end)]
        return max(seen) - self.before if seen else None


class Children:
    """Runs them, one at a time.

    Args:
        logs: folder for what they write.
        used: bytes of the device in use, by everybody; None where nobody can tell.
        fork: they may be forked.
    """

    def __init__(self, logs: Path, used: Used, *, fork: bool = True) -> None:
        self.logs, self.used, self.fork = logs, used, fork
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, call: str, arguments: dict[str, Any], *, timeout: float) -> Outcome:
        """Run ``call(emit, **arguments)`` in a child, and wait at most ``timeout`` seconds.

        Args:
            name: of its log.
            call: ``"package.module:function"``.
            arguments: JSON values.
            timeout: after it the child is killed, with all that it started.
        """
        log = self.logs / f"{name.replace('/', '.')}.jsonl"
        log.write_text("")
        outcome = Outcome(before=self.used())
        start = time.perf_counter()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = _forked(call, arguments, log) if self.fork else _started(call, arguments, log)
        code: int | None = None
        try:
            code = self._wait(pid, outcome, start + timeout)
        finally:
            if code is None:
                _kill(pid)
                os.waitpid(pid, 0)
        outcome.seconds = time.perf_counter() - start
        # A kill can cut the last line short.
        outcome.events = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        failure = outcome.event("error")
        if code is None:
            outcome.status, outcome.detail = "timeout", f"stopped after {timeout:.0f} s"
        elif failure is not None:
            outcome.status, outcome.detail = failure["state"], failure["message"]
        elif code:
            outcome.status, outcome.detail = "error", f"ended with wait status {code}"
        return outcome

    def _wait(self, pid: int, outcome: Outcome, until: float) -> int | None:
        """Its wait status; None if it took too long."""
        handle = os.pidfd_open(pid)
        looking = outcome.before is not None
        try:
            while (left := until - time.perf_counter()) > 0:
                ended, _, _ = select.select([handle], [], [], min(left, _SAMPLE_EVERY) if looking else left)
                if ended:
                    return os.waitpid(pid, 0)[1]
                if looking and (now := self.used()) is not None:
                    outcome.samples.append((time.monotonic(), now))
            return None
        finally:
            os.close(handle)


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(pid, signal.SIGKILL)


def _forked(call: str, arguments: dict[str, Any], log: Path) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(log.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = become(call, arguments, log, parent)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def _started(call: str, arguments: dict[str, Any], log: Path) -> int:
    told = json.dumps({"call": call, "arguments": arguments, "log": str(log), "parent": os.getpid()})
    script = Path(__file__).resolve().parents[1] / "gpu.py"
    with log.with_suffix(".out").open("wb") as output:
        child = subprocess.Popen([sys.executable, str(script), "--child", told], stdout=output, stderr=output)
    child.returncode = 0  # the caller waits for it by its number
    return child.pid


def become(call: str, arguments: dict[str, Any], log: Path, parent: int) -> int:
    """Be the child: run the call, write its events; returns the exit code."""
    os.setpgid(0, 0)  # what it starts is killed with it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return 1
    lines = os.open(log, os.O_WRONLY | os.O_APPEND)

    def emit(kind: str, **values: Any) -> None:
        os.write(lines, (json.dumps({"event": kind, "at": time.monotonic(), **values}) + "\n").encode())

    try:
        module, _, function = call.partition(":")
        getattr(importlib.import_module(module), function)(emit, **arguments)
        return 0
    except Exception as error:
        traceback.print_exc()
        emit("error", message=one_line(error), state=state_of(error), minimum=getattr(error, "minimum", None))
        return 0
