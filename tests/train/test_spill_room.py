"""A folder without room is met before the first step, and the step goes on without it where it can."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import narrowboat.train.step
from narrowboat.errors import SpillError
from train_kit import copy_of, mlp
from train_step_kit import narrow, plain, same, stepped, vectors

pytestmark = pytest.mark.usefixtures("small_things_count")
PAGE = 4096


@pytest.fixture
def fast_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be spilled is."""
    monkeypatch.setattr(narrowboat.train.step, "measure_bandwidth", lambda folder: (1e15, 1e15))


@contextmanager
def files_no_larger_than(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wide() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Activations that are worth the buffers of a spill file."""
    torch.manual_seed(0)
    layers = (layer for _ in range(12) for layer in (nn.Linear(128, 128), nn.Tanh()))
    return nn.Sequential(*layers, nn.Linear(128, 10)), [(torch.randn(4096, 128), torch.randint(10, (4096,)))] * 2


@pytest.mark.usefixtures("fast_storage")
def test_without_room_the_step_recomputes_instead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batches = wide()
    twin = copy_of(model)
    step = narrow(model, batches[0], 0.6, spill=tmp_path, techniques=["spill", "recompute"])
    with files_no_larger_than(PAGE):
        losses = stepped(step, batches)
    assert losses == plain(twin, batches) and same(model, twin)
    record = step.report().steps[-1]
    assert record.spilled == 0 and record.replays > 0
    assert any("activations on storage: reserving" in reason and "ulimit -f" in reason for reason in step.plan.refused)
    assert "activations stay in memory: reserving" in caplog.text
    step.close()


@pytest.mark.usefixtures("fast_storage")
def test_where_nothing_else_fits_the_full_folder_is_the_error_until_there_is_room(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batches = mlp(), vectors(64)
    before = copy_of(model)
    step = narrow(model, batches[0], 0.4, spill=tmp_path, techniques=["spill"])
    with files_no_larger_than(PAGE), pytest.raises(SpillError, match=r"reserving .* failed: File too large"):
        step(*batches[0])
    assert same(model, before)
    step(*batches[0])
    assert step.report().steps[-1].spilled > 0
    assert not same(model, before)
    step.close()
