"""``narrowboat zoo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from narrowboat.zoo import MODELS


def test_list_names_every_model_as_the_command_line_takes_it(narrowboat: Any) -> None:
    listed = narrowboat("zoo", "list", "--json").json()
    assert [model["model"] for model in listed] == [f"narrowboat.zoo:{name}" for name in MODELS]
    assert "narrowboat.zoo:vit_large" in narrowboat("zoo", "list").out


def test_save_writes_the_weights_it_reports(narrowboat: Any, tmp_path: Path) -> None:
    path = tmp_path / "lite.safetensors"
    report = narrowboat("zoo", "save", "efficientnet_lite2", "-o", path, "--seed", 3, "--json").json()
    assert report["file_bytes"] == path.stat().st_size
    assert report["seed"] == 3
    assert len(load_file(path)) == 386


def test_an_unknown_name_is_exit_2_and_writes_nothing(narrowboat: Any, tmp_path: Path) -> None:
    finished = narrowboat("zoo", "save", "resnet102", "-o", tmp_path / "x.safetensors")
    assert finished.code == 2
    assert "resnet101" in finished.err
    assert list(tmp_path.iterdir()) == []
