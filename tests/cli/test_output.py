"""JSON that every parser takes, tables that keep their text."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from narrowboat.cli.output import print_json, print_table, progress_bar


@dataclasses.dataclass(frozen=True)
class Row:
    path: Path
    dtype: torch.dtype
    ratio: float


def test_json_spells_out_dataclasses_paths_dtypes_and_not_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"row": Row(Path("a/b"), torch.float16, math.nan), 3: (torch.tensor(2), True, None)})
    assert json.loads(capsys.readouterr().out) == {
        "row": {"path": "a/b", "dtype": "torch.float16", "ratio": None},
        "3": [2, True, None],
    }


def test_a_table_prints_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ["name"], [["layers[0]"], ["[red]x[/]"]])
    out = capsys.readouterr().out
    assert "layers[0]" in out
    assert "[red]x[/]" in out


def test_a_factory_is_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("models:factory: its blocks", ["name"], [["package:rocket:"]])
    out = capsys.readouterr().out
    assert "models:factory: its" in out  # and wraps
    assert "package:rocket:" in out


def test_a_progress_bar_prints_nothing_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("packing") as progress:
        progress(1, 2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
