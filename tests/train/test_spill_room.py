"""A folder without room is met before the first step, and the step goes on without it where it can."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import narrowboat.train.step
from narrowboat.errors import BudgetError, SpillError
from narrowboat.train.plan import Planner, TrainPlan
from narrowboat.train.spill_room import plan_with_room
from narrowboat.train.step import TrainStep
from train_kit import copy_of, mlp
from train_step_kit import narrow, same, vectors

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


class Planned(Planner):
    """A planner with one plan that spills and one that does not."""

    def __init__(self, step: TrainStep, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        real = step._preparation.planner(*batch)
        super().__init__(real._study, real.premises)
        self.spilling, self.refuses = real.make(step.budget), False

    def make(self, budget: int) -> TrainPlan:
        if self.premises.rates.write is not None:
            return self.spilling
        if self.refuses:
            raise BudgetError("a training step needs more", minimum=budget + 1)
        return replace(self.spilling, refused=tuple(self._refused()), spilled=0, foreseen=None)


@pytest.mark.usefixtures("fast_storage")
def test_without_room_the_next_best_plan_is_taken_from_then_on(tmp_path: Path) -> None:
    batch = vectors(64)[0]
    step = narrow(mlp(), batch, 0.4, spill=tmp_path, techniques=["spill"])
    planner, told, pool = Planned(step, batch), list[str](), step._pool
    with files_no_larger_than(PAGE):
        assert plan_with_room(planner, step.budget, None, told.append) is planner.spilling and not told
        planner.refuses = True
        with pytest.raises(SpillError, match=r"reserving .* failed: File too large"):
            plan_with_room(planner, step.budget, pool, told.append)
        assert planner.premises.rates.write is not None and not told, "there may be room the next time"
        planner.refuses = False
        plan = plan_with_room(planner, step.budget, pool, told.append)
    assert plan.spilled == 0 and "activations stay in memory: reserving" in told[0]
    assert any("activations on storage: reserving" in reason and "ulimit -f" in reason for reason in plan.refused)
    assert plan_with_room(planner, step.budget, pool, told.append).spilled == 0 and len(told) == 1
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
