"""``narrowboat pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

MODEL = """
import torch

class Backwards(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Linear(4, 4)
        self.b = torch.nn.Linear(4, 4)

    def forward(self, x):
        return self.a(self.b(x))

def factory():
    return Backwards()

factory.example_inputs = lambda: (torch.zeros(1, 4),)
"""


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    layers = {name: torch.nn.Linear(4, 4) for name in ("a", "b")}
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "plain.safetensors"
    save_file(tensors, path)
    return path


def test_a_packed_file_holds_the_same_tensors_for_every_reader(
    narrowboat: Any, source: Path, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    packed = tmp_path / "packed.safetensors"
    report = narrowboat("pack", source, "-o", packed, "--verify", "--json").json()
    assert report["verified"] is True
    assert report["total_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    loaded = load_file(packed)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
    assert narrowboat("inspect", packed, "--json").json()["packed"] is True


def test_with_a_model_the_tensors_lie_in_the_order_of_use(
    narrowboat: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "backwards_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    packed = tmp_path / "packed.safetensors"
    finished = narrowboat("pack", source, "-o", packed, "--model", "backwards_model:factory")
    assert finished.code == 0, finished.err
    names = [tensor["name"] for tensor in narrowboat("inspect", packed, "--json").json()["tensors"]]
    assert [name[0] for name in names] == ["b", "b", "a", "a"]


def test_an_existing_file_is_kept_unless_told_otherwise(narrowboat: Any, source: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.safetensors"
    packed.write_bytes(b"precious")
    assert narrowboat("pack", source, "-o", packed).code == 2
    assert packed.read_bytes() == b"precious"
    assert narrowboat("pack", source, "-o", packed, "--overwrite").code == 0
    assert narrowboat("inspect", packed, "--json").json()["tensor_count"] == 4


def test_a_damaged_source_leaves_no_output(narrowboat: Any, source: Path, tmp_path: Path) -> None:
    source.write_bytes(source.read_bytes()[:-8])
    packed = tmp_path / "packed.safetensors"
    assert narrowboat("pack", source, "-o", packed).code == 1
    assert not packed.exists()
