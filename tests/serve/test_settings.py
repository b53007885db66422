"""What a gateway is told at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from narrowboat.errors import UsageError
from narrowboat.serve.settings import Limits, ServeSettings


def test_the_usual_settings_are_for_this_machine_alone() -> None:
    settings = ServeSettings(Path("tasks.yaml"))
    assert (settings.host, settings.port, settings.grpc_port, settings.tokens) == ("127.0.0.1", 8000, 8001, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"host": ""},
        {"host": "a b"},
        {"host": "http://a"},
        {"port": -1},
        {"port": 65536},
        {"grpc_port": 70000},
        {"port": 9000, "grpc_port": 9000},
        {"certificate": Path("a.pem")},
        {"key": Path("a.key")},
        {"models": Path("no such folder")},
        {"drain_seconds": -1.0},
        {"drain_seconds": float("inf")},
        {"drain_seconds": float("nan")},
    ],
)
def test_what_cannot_be_is_wrong_usage(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ServeSettings(Path("tasks.yaml"), **wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0},
        {"burst": -1},
        {"body_seconds": float("inf")},
        {"connections": True},
        {"header_seconds": "1"},
        {"body_bytes": 2**30, "held_bytes": 2**20},
    ],
)
def test_limits_are_numbers_that_let_something_in(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Limits(**wrong)
