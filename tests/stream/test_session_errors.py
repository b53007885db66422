"""Storage that fails, weights that change under the session, and models that raise: named errors, then right again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrowboat as nb
from narrowboat.errors import NarrowboatError, StorageError, WeightsChangedError

MIB = 1 << 20


class BrokenDisk:
    """``os.preadv`` of which every n-th call fails with EIO, while it is on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, every: int = 1) -> None:
        self.on = False
        self.calls = 0
        real = os.preadv

        def preadv(*args: Any) -> int:
            self.calls += 1
            if self.on and self.calls % every == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*args)

        monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("extra", [0, MIB])
def test_a_read_error_in_a_pass_is_named_and_the_next_call_is_right(
    deep: Any, monkeypatch: pytest.MonkeyPatch, extra: int
) -> None:
    disk = BrokenDisk(monkeypatch)
    model = deep.stream(budget=deep.minimum + extra)
    assert deep.right(model)
    for _ in range(3):
        disk.on = True
        with pytest.raises(StorageError, match=str(deep.path)), torch.inference_mode():
            model(deep.x)
        disk.on = False
        assert deep.right(model, 1), "the storage is well again"
    deep.assert_state(model.state_dict())


def test_read_errors_now_and_then_never_give_a_wrong_answer(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = BrokenDisk(monkeypatch, every=7)
    model = deep.stream(budget=deep.minimum + MIB)
    disk.on = True
    for _ in range(15):
        try:
            assert deep.right(model, 1)
        except StorageError as error:
            assert "Input/output error" in str(error)
    disk.on = False
    assert deep.right(model)


def test_read_errors_while_the_first_blocks_come_in_are_forgotten_once_storage_is_well(
    deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = BrokenDisk(monkeypatch)
    model = deep.stream(budget=deep.minimum + 2 * MIB)
    disk.on = True
    with pytest.raises(StorageError), torch.inference_mode():
        model(deep.x)
    disk.on = False
    assert deep.right(model, 3)


def test_an_unreadable_disk_when_opening_leaves_the_module_as_it_was(
    deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = deep.net().eval()
    module.load_state_dict(deep.plain.state_dict())
    disk = BrokenDisk(monkeypatch)
    disk.on = True
    with pytest.raises(StorageError):
        nb.stream(module, deep.path, budget=deep.minimum, example=(deep.x,))
    disk.on = False
    assert deep.right(module)
    assert deep.right(deep.stream(module))


def test_an_exception_the_model_catches_itself_does_not_spoil_the_pass(tmp_path: Path, deep: Any) -> None:
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(256, 256)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.fc(x)
            raise ValueError("not today")

    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(256, 256)
            self.part = Gives()
            self.rest = nn.ModuleList([nn.Linear(256, 256) for _ in range(6)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            try:
                x = self.part(x)
            except ValueError:
                x = x + 1
            for layer in self.rest:
                x = layer(x)
            return x

    torch.manual_seed(0)
    plain = Catches().eval()
    nb.pack(plain.state_dict(), tmp_path / "w.safetensors")
    model = deep.stream(
        Catches, tmp_path / "w.safetensors", budget=deep.least(Catches, tmp_path / "w.safetensors", deep.x)
    )
    with torch.inference_mode():
        want = plain(deep.x)
        assert all(torch.equal(model(deep.x), want) for _ in range(4))
    stats = nb.session(model).stats()
    assert stats["passes"] == 4
    assert len(stats["latency_ms"]) == 4


def alter(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(b"altered" * 100)


def replace(path: Path) -> None:
    nb.pack({"other": torch.zeros(3)}, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def truncate(path: Path) -> None:
    os.truncate(path, 10_000)


CHANGES: list[Callable[[Path], None]] = [alter, replace, truncate, Path.unlink]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("extra", [0, 64 * MIB], ids=["streamed", "resident"])
def test_weights_that_change_while_open_are_noticed_by_the_next_call(
    tmp_path: Path, deep: Any, change: Callable[[Path], None], extra: int
) -> None:
    path = deep.copy(tmp_path / "w.safetensors")
    model = deep.stream(path=path, budget=deep.minimum + extra)
    assert deep.right(model)
    change(path)
    for call in (model, model.layers[2]):
        with pytest.raises(WeightsChangedError, match=str(path)), torch.inference_mode():
            call(deep.x)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_touched_outside_a_pass_after_a_change_are_the_old_ones_or_an_error(
    tmp_path: Path, deep: Any, change: Callable[[Path], None]
) -> None:
    path = deep.copy(tmp_path / "w.safetensors")
    model = deep.stream(path=path)
    assert deep.right(model)
    change(path)
    for name, tensor in model.state_dict().items():
        try:
            assert torch.equal(tensor, deep.plain.state_dict()[name]), name
        except WeightsChangedError:
            continue


@pytest.mark.parametrize("change", [alter, truncate], ids=lambda change: change.__name__)
def test_weights_altered_in_the_middle_of_a_pass_give_no_answer(
    tmp_path: Path, deep: Any, change: Callable[[Path], None]
) -> None:
    path = deep.copy(tmp_path / "w.safetensors")
    model = deep.stream(path=path)
    assert deep.right(model)
    model.before = {5: lambda: change(path)}
    with pytest.raises(WeightsChangedError), torch.inference_mode():
        model(deep.x)


def test_the_error_of_a_closed_and_of_a_changed_session_are_narrowboats(tmp_path: Path, deep: Any) -> None:
    path = deep.copy(tmp_path / "w.safetensors")
    model = deep.stream(path=path)
    path.unlink()
    with pytest.raises(NarrowboatError), torch.inference_mode():
        model(deep.x)
    nb.session(model).close()
