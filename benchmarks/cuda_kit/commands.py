"""narrowboat's own command line, run as a person would."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

_SHOWN = 600  # characters of what a failed command said


@dataclass(frozen=True, slots=True)
class Said:
    """What a command came to.

    Attributes:
        command: as it was typed.
        code: its exit code; None if it took too long.
        seconds: it took.
        document: the JSON it printed; None if it was none.
        text: the end of all it said.
    """

    command: str
    code: int | None
    seconds: float
    document: dict[str, Any] | None
    text: str


def narrowboat(*arguments: str, timeout: float) -> Said:
    """Run ``narrowboat ARGUMENTS``, and end it with all that it started after ``timeout`` seconds."""
    command = "narrowboat " + " ".join(arguments)
    start = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "narrowboat", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ.copy(),
        start_new_session=True,
    )
    code: int | None = None
    try:
        out, err = child.communicate(timeout=timeout)
        code = child.returncode
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    document = None
    with contextlib.suppress(ValueError):
        document = json.loads(out)
    said = err.strip() or ("" if document is not None else out.strip())
    return Said(command, code, time.perf_counter() - start, document, said[-_SHOWN:])
