"""Run the command line as a person would, in this process, and see what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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


TINY_MODEL = """
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12)))
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(512))

    def forward(self, x):
        x = self.dropout(self.layers(x) * self.scale)
        return {"sum": x.sum(), "features": x}

def factory():
    return Tiny()

factory.example_inputs = lambda: (torch.ones(2, 512),)

def single():
    return torch.nn.Linear(512, 512)

single.example_inputs = factory.example_inputs

def without_example():
    return Tiny()
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is also the current one, with ``tiny_model.py`` and its weights ``tiny.safetensors``."""
    import sys

    import torch
    from safetensors.torch import save_file

    (tmp_path / "tiny_model.py").write_text(TINY_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_model", raising=False)
    import tiny_model

    torch.manual_seed(1)
    save_file(tiny_model.factory().state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path
