"""What people do around a training step: odd batches, modes, schedulers, saved states, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import BudgetError, LossError, TrainingError, UsageError
from narrowboat.train.step import train_step
from train_kit import CASES, GPT, autocast, budget_of, copy_of, cross_entropy, largest_difference, mlp
from train_step_kit import adam, narrow, plain, same, stepped, unchanged, vectors

pytestmark = pytest.mark.usefixtures("small_things_count")


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("name", ["mlp", "in place", "custom functions"])
def test_micro_batches_give_the_gradients_of_the_batch(name: str, parts: int) -> None:
    case = CASES[name]
    if name == "group and instance norm":
        case = CASES["mlp"].__class__(
            name, lambda: nn.Sequential(nn.Unflatten(1, (4, 8)), nn.GroupNorm(2, 4), nn.Flatten(), mlp())
        )
    here, there = case.model().double(), case.model().double()
    batches = vectors(48, 48, 48, dtype=torch.float64)
    step = narrow(here, batches[0], micro_batches=parts)
    assert step.plan.parts == parts
    want = plain(there, batches)
    assert stepped(step, batches) == pytest.approx(want, rel=1e-12)
    assert largest_difference(here, there) < 1e-11


def test_a_ragged_last_batch_and_batches_of_other_shapes() -> None:
    here, there = GPT(dropout=0.0), GPT(dropout=0.0)
    there.load_state_dict(here.state_dict())
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(0, 50, shape, generator=generator) for shape in ((6, 13), (4, 13), (2, 13), (6, 9), (8, 13))
    ]
    batches = [(text[:, :-1].clone(), text[:, 1:].clone()) for text in texts]
    step = narrow(here, batches[0])
    step.budget *= 2
    assert stepped(step, batches) == plain(there, batches)
    assert same(here, there)
    assert [record.departed for record in step.report().steps] == [""] * len(batches)


def test_micro_batches_of_one_sample_follow_their_plan() -> None:
    here, there = GPT(dropout=0.0).double(), GPT(dropout=0.0).double()
    there.load_state_dict(here.state_dict())
    batches = CASES["gpt"].batches(2)
    # Not Adam: it makes large steps of the roundings of gradients that are zero.
    ours, theirs = (torch.optim.SGD(model.parameters(), 0.1) for model in (here, there))
    step = narrow(here, batches[0], micro_batches=6, optimizer=ours)
    assert step.plan.micro_batch == 1 and step.plan.step is not None
    assert stepped(step, batches) == pytest.approx(plain(there, batches, optimizer=theirs), rel=1e-12)
    assert {record.departed for record in step.report().steps} == {""}
    assert largest_difference(here, there) < 1e-11


def test_a_batch_is_left_as_it_was_by_measuring_a_model_that_writes_to_its_input() -> None:
    class Centring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.sub_(0.5))

    torch.manual_seed(0)
    here = Centring()
    there = copy_of(here)
    ours, theirs = vectors(16, 16), vectors(16, 16)
    step = narrow(here, ours[0])
    assert torch.equal(ours[0][0], theirs[0][0])
    assert stepped(step, ours) == plain(there, theirs)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(ours, theirs, strict=True))
    assert same(here, there)


# -- modes and parts of the model ------------------------------------------------------------------------------------


def test_train_and_eval_mode_have_plans_of_their_own() -> None:
    case = CASES["resnet"]
    here, there = case.model(), case.model()
    batches = case.batches(4)
    step = narrow(here, batches[0], 0.3)
    modes = [True, False, False, True]
    got = stepped(step, batches, lambda number: here.train(modes[number]))
    assert got == plain(there, batches, before=lambda number: there.train(modes[number]))
    assert same(here, there)


def test_frozen_layers_stay_and_thawed_ones_move() -> None:
    here, there = CASES["mlp"].model(), CASES["mlp"].model()
    batches = vectors(*[16] * 4)

    def freeze(model: nn.Module) -> Callable[[int], Any]:
        return lambda number: model[0].requires_grad_(number >= 2)

    ours, theirs = torch.optim.SGD(here.parameters(), 0.1), torch.optim.SGD(there.parameters(), 0.1)
    freeze(here)(0)
    step = narrow(here, batches[0], optimizer=ours)
    step.budget *= 2
    assert stepped(step, batches, freeze(here)) == plain(there, batches, before=freeze(there), optimizer=theirs)
    assert same(here, there)
    step(*batches[0])
    assert all(parameter.grad is None for parameter in here.parameters())


# -- beside the step -------------------------------------------------------------------------------------------------


def test_clipping_and_a_scheduler() -> None:
    here, there = CASES["mlp"].model(), CASES["mlp"].model()
    batches = vectors(*[16] * 4)
    ours, theirs = adam(here), adam(there)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, 0.5) for each in (ours, theirs)]
    step = narrow(here, batches[0], optimizer=ours, clip_grad_norm=0.1)
    got = []
    for x, y in batches:
        got.append(step(x, y).item())
        schedulers[0].step()
    assert got == plain(there, batches, optimizer=theirs, clip=0.1, after=lambda number: schedulers[1].step())
    assert same(here, there)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == 1e-2 / 16


def test_a_gradient_scaler_skips_what_overflows() -> None:
    here, there = CASES["mlp"].model(), CASES["mlp"].model()
    batches = vectors(16, 16, 16)
    batches[1] = (batches[1][0] * float("inf"), batches[1][1])
    ours, theirs = adam(here), adam(there)
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in range(2)]
    step = narrow(here, batches[0], optimizer=ours, scaler=scalers[0])
    for x, y in batches:
        step(x, y)
        theirs.zero_grad()
        scalers[1].scale(cross_entropy(there(x), y)).backward()
        scalers[1].step(theirs)
        scalers[1].update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 512.0
    assert same(here, there)


def test_training_goes_on_from_a_saved_state() -> None:
    here, there = CASES["mlp"].model(), CASES["mlp"].model()
    batches = vectors(*[16] * 4)
    want = plain(there, batches)
    first = narrow(here, batches[0])
    got = stepped(first, batches[:2])
    state, optimizer_state = here.state_dict(), first.optimizer.state_dict()
    first.close()
    torch.manual_seed(7)
    again = mlp()
    again.load_state_dict(state)
    optimizer = adam(again)
    optimizer.load_state_dict(optimizer_state)
    second = narrow(again, batches[2], optimizer=optimizer)
    got += stepped(second, batches[2:])
    assert got == want and same(again, there)


def test_autocast_around_the_step() -> None:
    here, there = CASES["mlp"].model(), CASES["mlp"].model()
    batches = vectors(16, 16, 16)
    optimizer, want = adam(there), []
    for x, y in batches:
        optimizer.zero_grad()
        with autocast():
            loss = cross_entropy(there(x), y)
        loss.backward()
        optimizer.step()
        want.append(loss.item())
    with autocast():
        step = narrow(here, batches[0])
        assert stepped(step, batches) == want
    assert same(here, there)


def test_backward_leaves_the_gradients_to_the_loop() -> None:
    here, there = CASES["mlp"].model(), CASES["mlp"].model()
    ((x, y),) = vectors(16)
    step = narrow(here, (x, y))
    loss = step.backward(x, y)
    cross_entropy(there(x), y).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(here.parameters(), there.parameters(), strict=True))
    assert not loss.requires_grad


def test_a_changed_budget_keeps_the_curve() -> None:
    here, there = CASES["mlp"].model().double(), CASES["mlp"].model().double()
    batches = vectors(*[48] * 6, dtype=torch.float64)
    step = narrow(here, batches[0], 1.0, micro_batches=None)
    shares = [1.0, 0.4, 0.0, 0.2, 0.7, 0.05]
    got = stepped(
        step, batches, lambda number: setattr(step, "budget", budget_of(step.prepare(*batches[0]), shares[number]))
    )
    assert len({(record.budget, record.micro_batches) for record in step.report().steps}) >= 3
    assert got == pytest.approx(plain(there, batches), rel=1e-12)
    assert largest_difference(here, there) < 1e-11


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt", "lstm"])
def test_a_refusal_names_the_minimum_and_the_minimum_passes(name: str) -> None:
    case = CASES[name]
    model = case.model()
    x, y = case.batches(1)[0]
    before = copy_of(model)
    step = train_step(model, cross_entropy, adam(model), budget=1000, adapt=False, enforce=False)
    with pytest.raises(BudgetError) as refused:
        step(x, y)
    assert refused.value.limiter in str(refused.value) and refused.value.limiter
    assert same(model, before)
    step.budget = refused.value.minimum - 1
    with pytest.raises(BudgetError) as again:
        step(x, y)
    assert again.value.minimum == refused.value.minimum
    step.budget = refused.value.minimum
    step(x, y)
    assert step.plan.predicted_peak <= refused.value.minimum == step.plan.min_budget


def test_a_refusal_of_one_byte_knows_what_kernels_hold_inside() -> None:
    def refused_in(budget: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.Flatten(), nn.LazyLinear(10))
        model(x)
        step = train_step(model, cross_entropy, torch.optim.SGD(model.parameters(), 0.1), budget=budget, adapt=False)
        with step, pytest.raises(BudgetError) as refused:
            step.prepare(x, y)
        return refused.value.minimum

    x, y = torch.rand(8, 3, 64, 64), torch.randint(0, 10, (8,))
    # oneDNN's scratch memory is tried out where it fits: into a budget that is nearly enough it does.
    least = refused_in(1)
    assert refused_in(least - (64 << 10)) == pytest.approx(least, rel=0.002)


@pytest.mark.parametrize("name", ["resnet", "counting", "spectral norm"])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(name: str) -> None:
    case = CASES[name]
    here, there = case.model(), case.model()
    batches = case.batches(3)
    step = narrow(here, batches[0], 0.3)
    torch.manual_seed(2)
    got = [step(*batches[0]).item()]
    bad = (torch.full_like(batches[1][0], float("nan")), batches[1][1])
    assert "nan" in unchanged(here, step, bad, LossError)
    got += [step(*batch).item() for batch in batches[1:]]
    assert got == plain(there, batches)
    assert same(here, there)


def test_losses_that_are_no_scalar_or_have_no_graph() -> None:
    model = CASES["mlp"].model()
    (batch,) = vectors(16)
    step = train_step(model, lambda out, y: F.cross_entropy(out, y, reduction="none"), adam(model), budget="8GiB")
    assert "scalar" in unchanged(model, step, batch, LossError)
    step = train_step(model, lambda out, y: out.detach().sum(), adam(model), budget="8GiB")
    unchanged(model, step, batch, LossError)


def test_optimizers_that_cannot_be_used() -> None:
    model = mlp()
    with pytest.raises(TrainingError, match="not the model's"):
        train_step(model, cross_entropy, adam(mlp()))
    with pytest.raises(TrainingError, match="LBFGS"):
        train_step(model, cross_entropy, torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UsageError):
        train_step(model, cross_entropy, "adam")
