"""What tells nodes and weights apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from narrowboat.cluster.facts import differing, versions, weights_digest
from narrowboat.tasks.spec.load import tasks_from
from narrowboat.tasks.spec.schema import TaskSpec


def spec(**fields: object) -> TaskSpec:
    told = {"name": "t", "model": "zoo:resnet18", "period": "1s", **fields}
    return tasks_from({"budget": "1GiB", "tasks": [told]}).tasks[0]


def test_versions_name_what_decides() -> None:
    assert set(versions()) >= {"narrowboat", "python", "torch", "safetensors"}
    assert "+" not in versions()["torch"]


def test_only_what_both_have_is_compared() -> None:
    assert differing({"narrowboat": "1", "torch": "2"}, {"narrowboat": "1"}) == ""
    assert differing({"narrowboat": "1"}, {"narrowboat": "2", "torch": "2"}) == "narrowboat 2 instead of 1"


def test_weights_are_told_apart_by_one_byte_of_a_sampled_place_and_by_size(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(bytes(3 << 20))
    before = weights_digest(spec(weights="w.safetensors"), tmp_path)
    assert before == weights_digest(spec(weights="w.safetensors"), tmp_path)
    file.write_bytes(b"\1" + bytes((3 << 20) - 1))
    other = weights_digest(spec(weights="w.safetensors"), tmp_path)
    file.write_bytes(bytes((3 << 20) + 1))
    assert len({before, other, weights_digest(spec(weights="w.safetensors"), tmp_path)}) == 3


def test_a_small_file_is_compared_whole(tmp_path: Path) -> None:
    seen = set()
    for place in range(0, 1000, 100):
        data = bytearray(1000)
        data[place] = 1
        (tmp_path / "w.pth").write_bytes(data)
        seen.add(weights_digest(spec(weights="w.pth"), tmp_path))
    assert len(seen) == 10


def test_a_folder_counts_with_all_its_weights_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"1")
    (folder / "config.json").write_text("{}")
    first = weights_digest(spec(model="model"), tmp_path)
    (folder / "config.json").write_text("{ }")
    assert weights_digest(spec(model="model"), tmp_path) == first
    (folder / "b.safetensors").write_bytes(b"1")
    assert weights_digest(spec(model="model"), tmp_path) != first
    assert weights_digest(spec(model="text:model?window=8"), tmp_path) != first


def test_a_model_without_files_of_ours_has_no_digest(tmp_path: Path) -> None:
    assert weights_digest(spec(), tmp_path) == ""


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        weights_digest(spec(weights="none.safetensors"), tmp_path)
