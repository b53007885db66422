"""Structured logs: one JSON object a line on stderr, with time, level, event and what belongs to it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGER = logging.getLogger("narrowboat.serve")
LEVELS = ("debug", "info", "warning", "error")
_FOREIGN = ("uvicorn", "uvicorn.error", "uvicorn.asgi", "asyncio", "grpc", "grpc._cython.cygrpc")


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """``{"time", "level", "event", ...}``; where an exception is logged, its traceback in ``traceback``."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        if fields is None:  # not by log(): another library's
            told |= {"event": "message", "logger": record.name, "message": record.getMessage().strip()}
        else:
            told |= {"event": record.msg, **fields}
        if record.exc_info and record.exc_info[0] is not None:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def log(event: str, *, level: int = logging.INFO, error: BaseException | None = None, **fields: Any) -> None:
    """Write one line.

    Args:
        event: what happened, a word or two that do not vary.
        level: of ``logging``.
        error: whose traceback belongs in the log.
        fields: for machines; nothing secret.
    """
    if LOGGER.isEnabledFor(level):
        LOGGER.log(level, event, exc_info=error, extra={"fields": fields})


def set_up(level: str = "info", stream: TextIO | None = None) -> None:
    """Have this process's gateway, and the libraries it stands on, log to ``stream`` (stderr) from ``level`` up."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(level.upper())
    for name in _FOREIGN:  # their news are of connections and tasks, which ours tell better; their complaints are kept
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
