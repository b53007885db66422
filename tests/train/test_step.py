"""What people do around a training step: odd batches, modes, schedulers, failures in the middle, changed minds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_kit import CASES, GPT, ResNet, autocast, budget_of, copy_of, cross_entropy, images, largest_difference, mlp

from narrowboat.errors import BudgetError, LossError, TrainingError, UsageError
from narrowboat.train.step import TrainStep, train_step

pytestmark = pytest.mark.usefixtures("small_things_count")
Batches = list[tuple[Tensor, Tensor]]


def vectors(*sizes: int, dtype: torch.dtype = torch.float32) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 32, generator=generator, dtype=dtype), torch.randint(0, 10, (n,), generator=generator))
        for n in sizes
    ]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def narrow(model: nn.Module, batch: tuple[Tensor, Tensor], share: float = 0.0, **options: Any) -> TrainStep:
    """A step whose activations have a share of what the plain step takes; 0 is the smallest budget."""
    options = {"optimizer": adam(model), "micro_batches": 1, "adapt": False, "enforce": False, **options}
    step = train_step(model, options.pop("loss_fn", cross_entropy), budget="8GiB", **options)
    step.budget = budget_of(step.prepare(*batch), share)
    return step


def plain(
    model: nn.Module,
    batches: Batches,
    *,
    before: Callable[[int], None] = lambda number: None,
    after: Callable[[int], None] = lambda number: None,
    optimizer: torch.optim.Optimizer | None = None,
    loss_fn: Callable[..., Tensor] = cross_entropy,
    clip: float | None = None,
) -> list[float]:
    """The loop that everybody writes."""
    optimizer, losses = optimizer or adam(model), []
    torch.manual_seed(2)
    for number, (x, y) in enumerate(batches):
        before(number)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        after(number)
    return losses


def stepped(step: TrainStep, batches: Batches, before: Callable[[int], None] = lambda number: None) -> list[float]:
    torch.manual_seed(2)
    losses = []
    for number, (x, y) in enumerate(batches):
        before(number)
        losses.append(step(x, y).item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return largest_difference(a, b) == 0


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
        torch.randint(0, 50, shape, generator=generator) for shape in ((6, 13), (4, 13), (1, 13), (6, 9), (8, 13))
    ]
    batches = [(text[:, :-1].clone(), text[:, 1:].clone()) for text in texts]
    step = narrow(here, batches[0])
    step.budget *= 2
    assert stepped(step, batches) == plain(there, batches)
    assert same(here, there)
    assert [record.departed for record in step.report().steps] == [""] * len(batches)


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
    got = stepped(step, batches, lambda number: [here.train(modes[number])] and None)
    assert got == plain(there, batches, before=lambda number: [there.train(modes[number])] and None)
    assert same(here, there)


def test_frozen_layers_stay_and_thawed_ones_move() -> None:
    here, there = CASES["mlp"].model(), CASES["mlp"].model()
    batches = vectors(*[16] * 4)

    def freeze(model: nn.Module) -> Callable[[int], None]:
        return lambda number: [model[0].requires_grad_(number >= 2)] and None

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


def unchanged(model: nn.Module, step: TrainStep, batch: tuple[Tensor, Tensor], error: type[Exception]) -> str:
    """Make a step that fails; nothing may move. Gives what was said."""
    before, state = copy_of(model), torch.get_rng_state()
    moments = {k: v for k, v in step.optimizer.state_dict()["state"].items()}
    with pytest.raises(error) as raised:
        step(*batch)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert step.optimizer.state_dict()["state"].keys() == moments.keys()
    assert all(parameter.grad is None for parameter in model.parameters())
    return str(raised.value)


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


# -- in the middle of a step -----------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Passes its input on, and fails when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.forward_error: Exception | None = None
        self.backward_error: Exception | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.forward_error is not None:
            error, self.forward_error = self.forward_error, None
            raise error
        if self.backward_error is not None and x.requires_grad:
            error, self.backward_error = self.backward_error, None
            x = x * 1.0
            x.register_hook(lambda grad: _throw(error))
        else:
            x = x * 1.0
        return x


def _throw(error: Exception) -> None:
    raise error


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError(ALLOCATOR)], ids=["MemoryError", "allocator"])
@pytest.mark.parametrize("where", ["forward_error", "backward_error"])
def test_an_overrun_repeats_the_batch_on_a_smaller_plan(where: str, error: Exception) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(ResNet(), nn.Linear(10, 32), nn.Dropout(0.3), Failing(), nn.BatchNorm1d(32), mlp())

    here, there = make().train(), make().train()
    generator = torch.Generator().manual_seed(1)
    batches = [images(8, generator) for _ in range(3)]
    step = narrow(here, batches[0], 1.0)
    budget = step.budget

    def sabotage(number: int) -> None:
        if number == 1:
            setattr(here[3], where, error)

    assert stepped(step, batches, sabotage) == plain(there, batches)
    assert same(here, there)
    assert [record.repeated for record in step.report().steps] == [0, 1, 0]
    assert step.budget < budget
    assert "out of memory" in str(step.report().changes)
    assert here[3].calls == there[3].calls == 3


def test_no_memory_on_the_smallest_plan_either_gives_the_step_up_and_changes_nothing() -> None:
    model = nn.Sequential(mlp(), Failing(), nn.Linear(10, 10))
    batches = vectors(16, 16)
    step = narrow(model, batches[0])

    class Always(Failing):
        def forward(self, x: Tensor) -> Tensor:
            raise MemoryError("no room")

    model[1].__class__ = Always
    assert "no room" in unchanged(model, step, batches[0], TrainingError)
    model[1].__class__ = Failing
    step(*batches[0])


def test_other_errors_of_the_model_come_through_and_change_nothing() -> None:
    model = nn.Sequential(mlp(), Failing(), nn.BatchNorm1d(10))
    batches = vectors(16, 16)
    step = narrow(model, batches[0])
    model[1].forward_error = ValueError("mine")
    calls = model[1].calls
    with pytest.raises(ValueError, match="mine"):
        step(*batches[0])
    assert model[1].calls == calls
    assert int(model[2].num_batches_tracked) == 0


# -- passes that differ ----------------------------------------------------------------------------------------------


class LayerDrop(nn.Module):
    """Leaves layers out by Python's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if random.random() < 0.7:
                x = x + layer(x)
        return self.head(x)


class Experts(nn.Module):
    """Routes samples by numbers that only the pass knows, and counts where they went."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(32, 4), nn.Linear(32, 10)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4))
        self.register_buffer("used", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            weight, choice = self.gate(x).softmax(1).max(1)
            out = torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                chosen = (choice == number).nonzero().flatten()
                if chosen.numel() > 4:
                    self.used[number] += chosen.numel()
                    out = out.index_add(0, chosen, expert(x[chosen]) * weight[chosen, None])
            x = x + out * (1 + self.used.mean() / 100)
        return self.head(x)


class Swapping(nn.Module):
    """The same operators each time, but on other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            a, b = torch.tanh(self.left(x)), torch.tanh(self.right(x))
            if random.random() < 0.5:
                a, b = b, a
            x = torch.sub(a * 2, b).sin()
        return self.head(x)


class LateWrites(nn.Module):
    """Writes, only sometimes, to what was read before: a buffer, and a tensor of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 10)
        self.register_buffer("shift", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(layer(x) + self.shift)
            x = x + self.shift
            y = x * 2.0
            if random.random() < 0.4:
                x += 1.0
                self.shift += 0.125
            x = torch.cos(y) + x
        return self.head(x)


@pytest.mark.parametrize("make", [LayerDrop, Experts, Swapping, LateWrites])
def test_a_pass_that_leaves_its_plan_is_still_right_and_says_so(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    here = make().train()
    there = copy_of(here)
    batches = vectors(*[24] * 12)
    step = narrow(here, batches[0])
    random.seed(3)
    got = stepped(step, batches)
    after = random.getstate()
    random.seed(3)
    assert got == plain(there, batches)
    assert same(here, there)
    assert random.getstate() == after
    departed = [record.departed for record in step.report().steps]
    assert any(departed)
    assert "instead of" in next(filter(None, departed))


# -- what plain torch refuses ----------------------------------------------------------------------------------------


class Spoiling(nn.Module):
    """Writes to what autograd saved: a result, an argument from the pass, or a buffer."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.net, self.what, self.spoil = mlp(), what, False
        self.register_buffer("scale", torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.exp(self.net(x).tanh())
        out = hidden * self.scale
        if self.spoil:
            with torch.no_grad():
                (hidden if self.what == "result" else self.scale).add_(1.0)
        return torch.sin(out * 2.0)


@pytest.mark.parametrize("techniques", [("recompute",), ("reduce", "compact")])
@pytest.mark.parametrize("what", ["result", "buffer"])
def test_a_write_to_what_autograd_saved_is_refused_as_plain_torch_does(what: str, techniques: tuple[str, ...]) -> None:
    model = Spoiling(what)
    batches = vectors(256, 256)
    step = narrow(model, batches[0], techniques=techniques)
    step(*batches[0])
    model.spoil = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cross_entropy(copy_of(model)(batches[1][0]), batches[1][1]).backward()
    assert "modified by an inplace operation" in unchanged(model, step, batches[1], RuntimeError)
