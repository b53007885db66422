"""What cannot be used is refused in one line that says what, where, and what to do; nothing is changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import narrowboat as nb
from narrowboat.errors import LossError, NarrowboatError, TrainingError, UsageError
from train_kit import copy_of, cross_entropy, mlp
from train_step_kit import adam, same, vectors

pytestmark = pytest.mark.usefixtures("small_things_count")


def refusal(error: type[NarrowboatError], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"scaler": 1}, "torch.amp.GradScaler"),
        ({"count": 3}, "count=3 cannot be called"),
        *[({"micro_batches": wrong}, "give a whole number from 1 on") for wrong in (1.5, 0, -1, True, "2")],
        ({"clip_grad_norm": "a"}, "give a positive number"),
        ({"clip_grad_norm": True}, "give a positive number"),
        ({"clip_grad_norm": float("nan")}, "give a positive number"),
        ({"batch_norm": "no"}, "choose one of auto"),
        ({"buget": "1GiB"}, "did you mean budget=?"),
        ({"microbatches": 2}, "did you mean micro_batches=?"),
        ({"zzz": 2}, "there are budget, spill, weights"),
        ({"techniques": ["recomput"]}, "did you mean 'recompute'?"),
        ({"techniques": ["recompute", 3]}, "there is no 3"),
        ({"techniques": [["recompute"]]}, "there is no ['recompute']"),
        ({"techniques": 3}, "give names among"),
        ({"techniques": "recompute,spill"}, "there is no 'recompute,spill'"),
        ({"budget": 1.5}, "no whole number of bytes"),
        ({"budget": True}, "not a byte size"),
        ({"spill": ""}, "give the path of a folder"),
        ({"spill": 3}, "give the path of a folder"),
    ],
    ids=str,
)
def test_options_of_another_kind(option: dict[str, Any], said: str) -> None:
    model = mlp()
    before = copy_of(model)
    assert said in refusal(UsageError, lambda: nb.train_step(model, cross_entropy, adam(model), **option))
    assert same(model, before)


@pytest.mark.parametrize(
    ("loss_fn", "said"), [("mse", "cannot be called"), (3, "cannot be called"), (nn.MSELoss, "give an instance")]
)
def test_losses_that_are_no_function(loss_fn: Any, said: str) -> None:
    model = mlp()
    assert said in refusal(UsageError, lambda: nb.train_step(model, loss_fn, adam(model)))


@pytest.mark.parametrize("model", [None, nn.Linear, lambda x: x], ids=["None", "a class", "a function"])
def test_models_that_are_none(model: Any) -> None:
    assert "the model is" in refusal(UsageError, lambda: nb.train_step(model, cross_entropy, adam(mlp())))
    assert "the model is" in refusal(UsageError, lambda: nb.checkpoint_plan(model, torch.zeros(2, 2), "1GiB"))


def test_one_technique_may_be_given_as_a_string() -> None:
    model = mlp()
    (batch,) = vectors(16)
    step = nb.train_step(model, cross_entropy, adam(model), budget="1GiB", techniques="recompute")
    assert "compact: switched off" in step.prepare(*batch).refused
    planned = nb.checkpoint_plan(mlp(), batch[0], "1GiB", techniques="recompute")
    refused = planned.narrowboat.plan.refused  # type: ignore[union-attr]
    assert "compact: switched off" in refused and "recompute: switched off" not in refused


def test_batches_that_cannot_be_trained_on() -> None:
    model = mlp()
    (batch,) = vectors(64)
    empty = batch[0][:0], batch[1][:0]
    before = copy_of(model)
    step = nb.train_step(model, cross_entropy, adam(model), budget="1GiB")
    for call in (step, step.prepare, step.backward):
        assert "the batch is empty" in refusal(TrainingError, lambda call=call: call(*empty))  # type: ignore[misc]
    many = nb.train_step(model, cross_entropy, adam(model), budget="1GiB", micro_batches=65)
    assert "micro_batches=65, and the batch has 64 samples" in refusal(UsageError, lambda: many(*batch))
    assert same(model, before)
    step(*batch)
    assert "the batch is empty" in refusal(TrainingError, lambda: step(*empty))


@pytest.mark.parametrize("micro_batches", [None, 1, 2])
def test_a_complex_loss_is_refused(micro_batches: int | None) -> None:
    model = mlp()
    (batch,) = vectors(16)

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.complex(out.mean(), out.mean())

    def pair(out: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, int]:
        return torch.complex(out.sum(), out.sum()), len(out)

    for each in (loss, pair):
        step = nb.train_step(model, each, adam(model), budget="1GiB", micro_batches=micro_batches)
        assert "the loss is complex" in refusal(LossError, lambda step=step: step(*batch))  # type: ignore[misc]


def test_sparse_adam_is_refused_with_what_to_do() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SparseAdam(model.parameters())
    said = refusal(TrainingError, lambda: nb.train_step(model, lambda out, y: out.sum(), optimizer))
    assert "sparse=False" in said and "without narrowboat" in said


@pytest.mark.parametrize("how", [pickle.dumps, copy.deepcopy, copy.copy])
def test_a_step_is_not_copied(how: Callable[[Any], Any]) -> None:
    model = mlp()
    with nb.train_step(model, cross_entropy, adam(model), budget="1GiB") as step:
        step(*vectors(16)[0])
        assert "optimizer.state_dict()" in refusal(UsageError, lambda: how(step))


@pytest.mark.parametrize("example", [None, 3, "words", {3: torch.zeros(2, 2)}], ids=repr)
def test_examples_that_are_no_arguments(example: Any) -> None:
    model = nn.Linear(2, 2)
    assert "the example is" in refusal(UsageError, lambda: nb.checkpoint_plan(model, example, "1GiB"))
    assert "narrowboat" not in model.__dict__ and "forward" not in model.__dict__


@pytest.mark.parametrize("budget", [None, 1.5, 0, -1, "lots", [], True], ids=repr)
def test_budgets_that_are_no_size(budget: Any) -> None:
    model = nn.Linear(2, 2)
    assert "budget" in refusal(UsageError, lambda: nb.checkpoint_plan(model, torch.zeros(2, 2), budget))
    assert "narrowboat" not in model.__dict__


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"spill": ""}, "spill=''"),
        ({"techniques": 3}, "techniques=3"),
        ({"techniques": ("recomput",)}, "did you mean 'recompute'?"),
        ({"optimizer": 3}, "optimizer is a int"),
    ],
    ids=str,
)
def test_options_of_a_plan_of_another_kind(option: dict[str, Any], said: str) -> None:
    assert said in refusal(
        UsageError, lambda: nb.checkpoint_plan(nn.Linear(2, 2), torch.zeros(2, 2), "1GiB", **option)
    )


def test_an_empty_example_is_refused_and_an_empty_call_goes_through() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    assert "empty" in refusal(TrainingError, lambda: nb.checkpoint_plan(model, torch.zeros(0, 2), "1GiB"))
    planned = nb.checkpoint_plan(model, torch.zeros(4, 2), "1GiB")
    assert planned(torch.zeros(0, 2)).shape == (0, 3)


def test_a_path_of_a_folder_is_no_mistake(tmp_path: Path) -> None:
    model = mlp()
    for spill in (tmp_path, str(tmp_path)):
        with nb.train_step(model, F.cross_entropy, adam(model), budget="1GiB", spill=spill) as step:
            step(*vectors(16)[0])


def test_sparse_gradients_are_refused_before_an_optimizer_that_does_not_step_them() -> None:
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    batch = torch.randint(50, (6, 2)), torch.randint(3, (6,))
    said = refusal(TrainingError, lambda: nb.train_step(model, cross_entropy, adam(model)))
    assert said.startswith("0 makes sparse gradients, which AdamW does not step: make it with sparse=False")
    before = model[0].weight.detach().clone()
    nb.train_step(model, cross_entropy, torch.optim.SGD(model.parameters(), 0.1), budget="1GiB")(*batch)
    assert not torch.equal(model[0].weight, before)
    model[0].weight.requires_grad_(False)
    nb.train_step(model, cross_entropy, adam(model), budget="1GiB")(*batch)
