"""What a run leaves on disk."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrowboat.errors import StorageError, UsageError, WeightsFormatError, WeightsMismatchError, WeightsNotFoundError
from narrowboat.train.recipes import saved
from narrowboat.train.recipes.saved import open_run, save_run, state_path

SETTINGS = {"batch": 4, "optimizer": "adamw"}


def _trained(width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, width)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_everything_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, optimizer = _trained()
    out = tmp_path / "out.safetensors"
    save_run(out, model, optimizer, 7, SETTINGS)
    wanted = [tensor.clone() for tensor in _tensors((model.state_dict(), optimizer.state_dict()))]
    drawn = torch.rand(3)
    run = open_run(state_path(out))
    assert (run.steps, run.settings) == (7, SETTINGS)
    other_model, other_optimizer = _trained()
    run.restore(other_model, other_optimizer)
    found = _tensors((other_model.state_dict(), other_optimizer.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert torch.equal(torch.rand(3), drawn)

    from safetensors.torch import load_model

    read, _ = _trained()
    load_model(read, out)
    assert all(
        torch.equal(a, b) for a, b in zip(_tensors(model.state_dict()), _tensors(read.state_dict()), strict=True)
    )


def test_other_settings_and_other_models_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    save_run(out, *_trained(), 7, SETTINGS)
    run = open_run(state_path(out))
    run.check(SETTINGS)
    with pytest.raises(UsageError, match="a run with batch 4, and this one has 5"):
        run.check({**SETTINGS, "batch": 5})
    with pytest.raises(WeightsMismatchError, match="another model"):
        run.restore(*_trained(width=4))


class _Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code in the file was run",)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"mark": 1})])
def test_what_is_no_state_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.state"
    path.write_bytes(content)
    with pytest.raises(WeightsFormatError, match="no training state"):
        open_run(path)


def test_a_file_of_torch_that_is_no_state_is_refused_and_no_code_is_run(tmp_path: Path) -> None:
    path = tmp_path / "x.state"
    for content in ({"model": 1}, [1], _Bomb()):
        torch.save(content, path)
        with pytest.raises(WeightsFormatError, match="no training state"):
            open_run(path)
    with pytest.raises(WeightsNotFoundError):
        open_run(tmp_path / "none.state")


def test_a_write_that_fails_leaves_the_state_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _trained()
    out = tmp_path / "out.safetensors"
    save_run(out, model, optimizer, 7, SETTINGS)
    before = state_path(out).read_bytes()

    def full(content: Any, file: Any) -> None:
        file.write(b"some of it")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left on the device")

    monkeypatch.setattr(saved.torch, "save", full)
    with pytest.raises(StorageError, match="no space left"):
        save_run(out, model, optimizer, 8, SETTINGS)
    assert state_path(out).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "out.safetensors.state"]


def test_a_flipped_byte_in_a_tensor_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    save_run(out, *_trained(64), 7, SETTINGS)
    path = state_path(out)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(WeightsFormatError, match="damaged"):
        open_run(path)
