"""Damaged bytes are found before the model sees them, where that was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import narrowboat as nb
from narrowboat.checkpoint import open_index
from narrowboat.errors import DigestError, UsageError


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]).eval()


X = torch.ones(1, 64)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    nb.pack(make().state_dict(), tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def damage(path: Path) -> None:
    at = open_index(path).entries["3.weight"].offset + 77
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def smallest(path: Path) -> int:
    with pytest.raises(nb.BudgetError) as caught:
        nb.stream(make, path, budget=1, example=(X,))
    return caught.value.minimum


@pytest.mark.parametrize("mode", ["load", "always"])
@pytest.mark.parametrize("roomy", [False, True])
def test_a_flipped_bit_names_tensor_and_file_every_time(
    packed: Path, mode: str, roomy: bool, tiny_blocks: None
) -> None:
    damage(packed)
    budget = 60 << 20 if roomy else smallest(packed)
    model = nb.stream(make, packed, budget=budget, example=(X,), verify=mode)
    with nb.session(model):
        for _ in range(2):
            with torch.inference_mode(), pytest.raises(DigestError, match=r"w\.safetensors.*\d\.(weight|bias)"):
                model(X)


@pytest.mark.parametrize("mode", ["off", "load", "always"])
def test_sound_weights_give_the_same_bits_whatever_is_checked(packed: Path, mode: str, tiny_blocks: None) -> None:
    plain = make()
    model = nb.stream(make, packed, budget=smallest(packed), example=(X,), verify=mode)
    with nb.session(model), torch.inference_mode():
        for _ in range(40):
            assert torch.equal(model(X), plain(X))


def test_damage_done_while_running_is_found_by_the_samples(
    packed: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nb.stream(make, packed, budget=smallest(packed), example=(X,), verify="always")
    session = nb.session(model)
    with session, torch.inference_mode():
        model(X)
        damage(packed)
        # As storage that fails would have it: the file's size and time tell nothing.
        monkeypatch.setattr(session, "_check_files", lambda: None)
        session.engine.on_touch = lambda: None
        for file in session.files:
            monkeypatch.setattr(type(file), "check_open_file", lambda self: None)
        with pytest.raises(DigestError):
            for _ in range(64):
                model(X)


def test_a_file_without_digests_cannot_be_verified(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(make().state_dict(), tmp_path / "u.safetensors")
    with pytest.raises(UsageError, match="digests"):
        nb.stream(make, tmp_path / "u.safetensors", budget="60MiB", example=(X,), verify="load")


def test_an_unknown_mode_is_bad_usage(packed: Path) -> None:
    with pytest.raises(UsageError, match="verify must be one of"):
        nb.stream(make, packed, budget="60MiB", example=(X,), verify=True)  # type: ignore[arg-type]


def test_an_example_that_does_not_fit_is_refused(packed: Path) -> None:
    with pytest.raises(nb.errors.ModelError, match="do not fit"):
        nb.stream(make, packed, budget="60MiB", example=(torch.ones(1, 3),))


_CHILD = """
import logging, sys, torch, narrowboat as nb
from torch import nn
logging.basicConfig(level=logging.WARNING)
make = lambda: nn.Sequential(nn.Linear(16, 4096), nn.ReLU(), nn.Linear(4096, 16)).eval()
nb.pack(make().state_dict(), sys.argv[1])
session = nb.session(nb.stream(model := make(), sys.argv[1], budget="20MiB"))
before = session.min_budget
with torch.inference_mode():
    model(torch.randn(6000, 16))
print(before, session.min_budget, session.peak_bytes)
"""


def test_without_an_example_the_first_pass_is_told_of_and_planned_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "wide.safetensors")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after, peak = map(int, done.stdout.split())
    assert before < 20 << 20
    assert peak > 6000 * 4096 * 4  # the activations between the layers
    assert after > 6000 * 4096 * 4
    assert "its activations were not known" in done.stderr
