"""What two processes tell each other now and then: a line of JSON each time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import IO, Any


class Lines:
    """One direction.

    Args:
        file: binary; written, or read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, told: dict[str, Any]) -> None:
        """One line.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        line = json.dumps(told).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def read(self) -> Iterator[dict[str, Any]]:
        """Everything, until the other side has ended."""
        while line := self._file.readline():
            yield json.loads(line)

    def close(self) -> None:
        """End it."""
        self._file.close()
