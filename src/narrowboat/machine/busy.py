"""Processes that keep cores busy, to measure beside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It ends by itself when its parent is gone, so that a killed measurement leaves nothing running.
_SPIN = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(200_000):
        pass
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep ``count`` processes spinning inside the block; all are running before it is entered."""
    children: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            children.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", _SPIN], stdout=subprocess.PIPE))
        for child in children:
            if child.stdout is not None:
                child.stdout.readline()
        yield
    finally:
        for child in children:
            child.kill()
        for child in children:
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
