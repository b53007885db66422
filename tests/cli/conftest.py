"""Run the command line as a person would, in this process, and see what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from narrowboat.cli.main import main


@dataclass(frozen=True)
class Finished:
    """A command that ran: its exit code and what it printed."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """What it printed on stdout, which is one JSON document."""
        return json.loads(self.out)


@pytest.fixture
def narrowboat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Finished]:
    """A function that runs ``narrowboat`` with the given arguments."""
    # The command sets these for its own process; put back what was there.
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")

    def run(*arguments: object) -> Finished:
        with pytest.raises(SystemExit) as finished:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        code = finished.value.code
        return Finished(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run
