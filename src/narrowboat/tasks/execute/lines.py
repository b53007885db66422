"""What two processes tell each other: a line of JSON each time, and bytes after it where the line says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import IO, Any

_BYTES = "payload_bytes"


class Lines:
    """One direction.

    Args:
        file: binary; written, or read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._lock = threading.Lock()

    def write(self, told: dict[str, Any], payload: bytes = b"") -> None:
        """One line, and bytes.

        Raises:
            BrokenPipeError: nobody reads any more.
        """
        if payload:
            told = {**told, _BYTES: len(payload)}
        with self._lock:
            self._file.write(json.dumps(told).encode() + b"\n")
            self._file.write(payload)
            self._file.flush()

    def read(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Everything, until the other side has ended."""
        while line := self._file.readline():
            told = json.loads(line)
            yield told, self._file.read(told.pop(_BYTES)) if _BYTES in told else b""

    def close(self) -> None:
        """End it."""
        self._file.close()
