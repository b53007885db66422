"""The log: one JSON object a line."""

from __future__ import annotations

import json
import logging

from narrowboat.serve.logs import log
from serve_guard_kit import logged


def test_a_line_has_time_level_event_and_fields() -> None:
    with logged() as said:
        log("admin", who="anyone", path="/with\nnew line")
    (line,) = said.getvalue().splitlines()
    told = json.loads(line)
    assert told.pop("time").endswith("+00:00")
    assert told == {"level": "info", "event": "admin", "who": "anyone", "path": "/with\nnew line"}


def test_levels_below_are_left_out() -> None:
    with logged("warning") as said:
        log("quiet")
        log("loud", level=logging.WARNING)
    assert [json.loads(line)["event"] for line in said.getvalue().splitlines()] == ["loud"]


def test_an_exception_is_one_line_too() -> None:
    with logged() as said:
        try:
            raise RuntimeError("why")
        except RuntimeError as error:
            log("failed", level=logging.ERROR, error=error)
    (line,) = said.getvalue().splitlines()
    assert "RuntimeError: why" in json.loads(line)["traceback"]


def test_other_libraries_speak_json_too() -> None:
    with logged() as said:
        logging.getLogger("uvicorn.error").warning("a %s", "warning")
        logging.getLogger("uvicorn.error").info("chatter")
        logging.getLogger("narrowboat.serve.oip").warning("a room's")
    first, second = (json.loads(line) for line in said.getvalue().splitlines())
    assert (first["message"], first["logger"]) == ("a warning", "uvicorn.error")
    assert second["message"] == "a room's"
