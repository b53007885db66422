"""``narrowboat inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    save_file({"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.zeros(2, dtype=torch.bfloat16)}, path)
    return path


def test_the_table_names_every_tensor_with_its_totals(narrowboat: Any, weights: Path) -> None:
    finished = narrowboat("inspect", weights)
    assert finished.code == 0
    for text in ("fc.weight", "float32", "2 x 3", "fc.bias", "bfloat16", "28 (28 B)", "narrowboat pack"):
        assert text in finished.out


def test_json_says_where_the_bytes_lie(narrowboat: Any, weights: Path) -> None:
    report = narrowboat("inspect", weights, "--json").json()
    assert report["total_bytes"] == 28
    assert report["packed"] is False
    by_name = {tensor["name"]: tensor for tensor in report["tensors"]}
    place = by_name["fc.weight"]["offset"]
    assert weights.read_bytes()[place : place + 24] == torch.arange(6.0).numpy().tobytes()


def test_tied_names_are_shown(narrowboat: Any, tmp_path: Path) -> None:
    shared = torch.ones(4)
    torch.save({"a": shared, "b": shared}, tmp_path / "tied.pth")
    report = narrowboat("inspect", tmp_path / "tied.pth", "--json").json()
    assert [tensor["aliases"] for tensor in report["tensors"]] == [["b"]]
    assert "1 tied names" in narrowboat("inspect", tmp_path / "tied.pth").out


def test_a_missing_file_is_exit_1_and_named(narrowboat: Any, tmp_path: Path) -> None:
    finished = narrowboat("inspect", tmp_path / "none.safetensors", "--json")
    assert finished.code == 1
    assert finished.json()["error"]["type"] == "WeightsNotFoundError"
    assert "none.safetensors" in finished.err


def test_a_file_of_something_else_is_exit_1(narrowboat: Any, tmp_path: Path) -> None:
    path = tmp_path / "poem.safetensors"
    path.write_text("not a weights file at all")
    finished = narrowboat("inspect", path)
    assert finished.code == 1
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1
