"""What a record says of itself: by which command it was made, with which versions, on which machine, when."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from narrowboat import __version__
from narrowboat.errors import NarrowboatError
from narrowboat.machine.cpu import cpu_supply
from narrowboat.machine.memory import memory_limits

_OURS = ("narrowboat", "__main__.py")


def about() -> dict[str, Any]:
    """For a record, under the key ``about``; imports nothing that is slow.

    ``when`` is UTC; ``command`` is empty where another program than ``narrowboat`` asked; ``memory_bytes`` is what
    was available then, the tightest limit counted.
    """
    supply = cpu_supply()
    try:
        available = int(memory_limits().available)
    except NarrowboatError:  # a system that does not tell
        available = 0
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "narrowboat": __version__,
        "torch": _version("torch"),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processor": supply.model,
        "cores": supply.cores,
        "threads": os.environ.get("OMP_NUM_THREADS", ""),
        "memory_bytes": available,
    }


def _command() -> str:
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    return shlex.join(["narrowboat", *sys.argv[1:]]) if program in _OURS else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
