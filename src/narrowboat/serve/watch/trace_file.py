"""A record as the text of a file, in pieces: whoever writes a long one does not hold others up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from narrowboat.tasks.record import Record

_PIECE = 500  # elements


def pieces(record: Record) -> Iterator[bytes]:
    """JSON that ``Record.load`` and ui.perfetto.dev read, as :meth:`Record.save` writes it."""
    mark = b"{"
    for key, value in record.as_json().items():
        yield mark + orjson.dumps(key) + b":"
        yield from _listed(value) if isinstance(value, list) else (orjson.dumps(value),)
        mark = b","
    yield b"}"


def _listed(values: list[Any]) -> Iterator[bytes]:
    yield b"["
    for begin in range(0, len(values), _PIECE):
        told = orjson.dumps(values[begin : begin + _PIECE])[1:-1]
        yield b"," + told if begin else told
    yield b"]"
