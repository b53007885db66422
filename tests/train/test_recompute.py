"""A recompute plan under somebody's own loop: the bits of the plain model, in fewer bytes."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import narrowboat as nb
from narrowboat.errors import BudgetError, ReplayError, TrainingError, UsageError
from narrowboat.train.tape.storages import StorageNumbers
from narrowboat.zoo.gpt import GPT

Call = Callable[[nn.Module], Tensor]


class Convolutions(nn.Module):
    """BatchNorm and dropout between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            [nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2)] for c in (3, 16, 16)
        ]
        self.body = nn.Sequential(*(layer for block in blocks for layer in block))
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        """Logits of images."""
        logits: Tensor = self.head(self.body(images).mean((2, 3)))
        return logits * scale


IMAGES = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(32) % 5
IDS = torch.randint(0, 50, (8, 128), generator=torch.Generator().manual_seed(0))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions()


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return GPT(vocabulary=50, context=128, width=64, layers=2, heads=4, dropout=0.1)


def image_loss(model: nn.Module, images: Tensor = IMAGES, classes: Tensor = CLASSES) -> Tensor:
    return F.cross_entropy(model(images), classes)


def text_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


KINDS = {"convolutions": (convolutions, image_loss, (IMAGES,)), "gpt": (gpt, text_loss, (IDS,))}


def smallest(model: nn.Module, example: Any, **options: Any) -> int:
    """About the smallest budget, from the refusal of a smaller one; units, and so minima, follow measured times."""
    with pytest.raises(BudgetError) as refused:
        nb.checkpoint_plan(model, example, 1, **options)
    return refused.value.minimum * 11 // 10


@cache
def smallest_of(kind: str) -> int:
    make, _, example = KINDS[kind]
    return smallest(make(), example)


def planned(kind: str) -> Any:
    """The model with about its tightest plan."""
    make, _, example = KINDS[kind]
    return nb.checkpoint_plan(make(), example, smallest_of(kind))


def train(model: nn.Module, loss: Call, steps: int = 3) -> list[Tensor]:
    """Losses, then gradients of the last step, then weights and buffers, from the same random numbers."""
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*losses, *gradients, *model.state_dict().values(), torch.rand(1)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Peak(TorchDispatchMode):
    """Bytes of tensors made inside, at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.worst = 0
        self._sizes: dict[int, int] = {}
        self._numbers = StorageNumbers(self._died)

    def _died(self, number: int) -> None:
        self.live -= self._sizes.pop(number, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._numbers.require(tensor.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self._numbers.get(tensor.untyped_storage()) is None:
                number = self._numbers.add_inside(tensor.untyped_storage())
                self._sizes[number] = tensor.untyped_storage().nbytes()
                self.live += self._sizes[number]
        self.worst = max(self.worst, self.live)
        return out


def peak_of(model: nn.Module, loss: Call) -> int:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Peak() as peak:
        loss(model).backward()
    return peak.worst


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_have_the_bits_of_the_plain_model(kind: str) -> None:
    make, loss, _ = KINDS[kind]
    model = planned(kind)
    assert same(train(model, loss), train(make(), loss))
    assert model.narrowboat.plan.step is not None
    assert model.narrowboat.planned == 3
    assert model.narrowboat.departed == ""


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_take_less_than_the_plain_step_and_no_more_than_the_budget(kind: str) -> None:
    make, loss, _ = KINDS[kind]
    model = planned(kind)
    here, plain = peak_of(model, loss), peak_of(make(), loss)
    assert here < 0.6 * plain
    static = model.narrowboat.plan.static
    assert here <= model.narrowboat.budget - static.weights - static.buffers - static.gradients


def test_activations_go_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowboat.train.recompute._IN_FLIGHT", 1 << 20)
    model: Any = nb.checkpoint_plan(convolutions(), (IMAGES,), "1GiB", spill=tmp_path, techniques=["spill"])
    model.narrowboat.budget = model.narrowboat.plan.min_budget
    assert same(train(model, image_loss), train(convolutions(), image_loss))
    assert model.narrowboat.plan.spilled > 0
    model.narrowboat.close()
    assert not list(tmp_path.iterdir())


def test_keyword_arguments_and_single_tensors_are_examples_too() -> None:
    for example in ({"images": IMAGES, "scale": 2.0}, IMAGES):
        model = nb.checkpoint_plan(convolutions(), example, "1GiB")
        assert model.narrowboat.plan.budget == 1 << 30


def test_gradients_accumulate_over_two_passes() -> None:
    model, plain = planned("gpt"), gpt()
    for each in (model, plain):
        torch.manual_seed(2)
        for _ in range(2):
            (text_loss(each) / 2).backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_two_graphs_at_once_have_their_own_tapes() -> None:
    model, plain = planned("convolutions"), convolutions()
    for each in (model, plain):
        torch.manual_seed(2)
        (each(IMAGES).square().sum() + each(IMAGES * 2).square().sum()).backward()
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_a_gradient_scaler_scales_and_unscales() -> None:
    model, plain = planned("gpt"), gpt()
    for each in (model, plain):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        scaler.scale(text_loss(each)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert same(list(model.parameters()), list(plain.parameters()))


def test_autocast_has_its_own_plan_and_its_own_bits() -> None:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return text_loss(model)

    model = planned("gpt")
    model.narrowboat.budget = smallest_of("gpt") * 3 // 2  # weights cast to bfloat16 come on top
    assert same(train(model, loss, 2), train(gpt(), loss, 2))
    assert model.narrowboat.plan.step is not None
    assert model.narrowboat.departed == ""


def test_gradients_of_inputs_reach_the_caller() -> None:
    grads = []
    for model in (convolutions().requires_grad_(False), convolutions().requires_grad_(False)):
        images = IMAGES.clone().requires_grad_()
        if not grads:
            nb.checkpoint_plan(model, (images,), smallest_of("convolutions"))
            assert images.grad is None
        torch.manual_seed(2)
        image_loss(model, images).backward()
        grads.append(images.grad)
    assert torch.equal(*grads)


def test_a_larger_batch_is_planned_anew_and_a_smaller_one_is_not() -> None:
    model, plain = planned("convolutions"), convolutions()
    first = model.narrowboat.plan

    def few(each: nn.Module) -> Tensor:
        return image_loss(each, IMAGES[:3], CLASSES[:3])

    assert same(train(model, few, 1), train(plain, few, 1))
    assert model.narrowboat.plan is first
    model.narrowboat.budget = "1GiB"
    model(IMAGES.repeat(2, 1, 1, 1))
    assert model.narrowboat.plan.micro_batch == 64


def test_a_larger_batch_that_does_not_fit_is_refused_before_it_runs() -> None:
    model = planned("convolutions")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError):
        model(IMAGES.repeat(3, 1, 1, 1))
    assert same(list(before.values()), list(model.state_dict().values()))


def test_without_gradients_the_plain_model_runs() -> None:
    model = planned("convolutions")
    torch.manual_seed(1)
    with torch.no_grad():
        out = model.eval()(IMAGES)
    assert torch.equal(out, convolutions().eval()(IMAGES))
    assert model.narrowboat.planned == 0


def test_closed_the_model_is_as_it_was() -> None:
    model = planned("convolutions")
    handle = model.narrowboat
    assert str(inspect.signature(model.forward)) == "(images: 'Tensor', scale: 'float' = 1.0) -> 'Tensor'"
    handle.close()
    assert not {"forward", "narrowboat"} & set(model.__dict__)
    assert torch.equal(handle(IMAGES[:1] * 0).isfinite(), torch.ones(1, 5, dtype=torch.bool))


def test_a_forward_of_the_instance_comes_back() -> None:
    model = convolutions()
    plain_forward = model.forward
    model.forward = lambda images: plain_forward(images) * 3  # type: ignore[method-assign]
    own = model.forward
    nb.checkpoint_plan(model, (IMAGES,), "1GiB")
    assert model(IMAGES).shape == (32, 5)
    model.narrowboat.close()  # type: ignore[union-attr, operator]
    assert model.forward is own


def test_a_second_plan_takes_the_place_of_the_first() -> None:
    model = nb.checkpoint_plan(convolutions(), (IMAGES,), "1GiB")
    first = model.narrowboat
    assert nb.checkpoint_plan(model, (IMAGES,), "2GiB").narrowboat is not first
    model.narrowboat.close()
    assert "forward" not in model.__dict__


def test_a_refused_budget_leaves_the_model_alone() -> None:
    model = convolutions()
    smallest(model, (IMAGES,))
    assert not {"forward", "narrowboat"} & set(model.__dict__)


def test_copies_have_plans_of_their_own() -> None:
    model = planned("gpt")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.narrowboat is twin.forward
        assert twin.narrowboat is not model.narrowboat
        assert twin.narrowboat.budget == model.narrowboat.budget
        assert same(train(twin, text_loss, 1), train(gpt(), text_loss, 1))
        assert twin.narrowboat.planned == 1
    assert model.narrowboat.planned == 0


def test_a_state_dict_has_nothing_of_the_plan() -> None:
    file = io.BytesIO()
    torch.save(planned("gpt").state_dict(), file)
    file.seek(0)
    gpt().load_state_dict(torch.load(file))


def test_an_optimizer_counts_if_it_is_given() -> None:
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters())
    without = smallest(model, (IDS,))
    state = 2 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert smallest(model, (IDS,), optimizer=optimizer) >= without + 0.95 * state


def test_outputs_that_the_caller_holds_are_counted() -> None:
    narrow, wide = (nn.Sequential(nn.Linear(8, 8), nn.Linear(8, width)) for width in (8, 100_000))
    x = torch.randn(64, 8)
    held = 64 * 100_000 * 4
    rest = sum(p.numel() * 4 * 2 for p in wide.parameters())
    assert smallest(wide, (x,)) - smallest(narrow, (x,)) >= 2 * held + rest - 10_000


class Returns(nn.Module):
    """Returns what a later part of it works on: an output that replays begin with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 256)
        self.rest = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.GELU())))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = self.first(x) + 1
        return middle, self.rest(middle * 2 + 1)


def test_a_changed_output_is_refused_where_replays_begin_with_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 16)
    model: Any = Returns()
    nb.checkpoint_plan(model, (x,), smallest(model, (x,)))
    assert model.narrowboat.plan.step is not None
    middle, out = model(x)
    with torch.no_grad():
        middle.mul_(0)
    with pytest.raises(ReplayError, match="change a clone"):
        out.sum().backward()


def test_second_derivatives_are_refused() -> None:
    model = planned("gpt")
    with pytest.raises(ReplayError, match="create_graph"):
        torch.autograd.grad(text_loss(model), list(model.parameters())[:1], create_graph=True)


def test_a_graph_that_is_retained_can_be_gone_through_twice() -> None:
    grads = []
    for each in (convolutions(), planned("convolutions")):
        torch.manual_seed(2)
        loss = image_loss(each)
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([parameter.grad for parameter in each.parameters()])
    assert same(*grads)


class Suspicious(Convolutions):
    """Does more where its tensors are fake, as code for exporters does."""

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        if isinstance(images, FakeTensor):
            images = images.exp().log()
        return super().forward(images, scale)


def test_a_model_that_knows_fake_tensors_is_planned_as_it_really_runs() -> None:
    torch.manual_seed(0)
    model: Any = Suspicious()
    nb.checkpoint_plan(model, (IMAGES,), smallest_of("convolutions"))
    assert same(train(model, image_loss, 1), train(convolutions(), image_loss, 1))
    assert model.narrowboat.plan.step is not None
    assert model.narrowboat.departed == ""


def test_a_plan_inside_a_training_step_leaves_the_step_to_plan() -> None:
    model, plain = planned("convolutions"), convolutions()
    results = []
    for each in (model, plain):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        step = nb.train_step(each, F.cross_entropy, optimizer, budget="1GiB", adapt=False, enforce=False)
        step(IMAGES, CLASSES)
        results.append(list(each.parameters()))
    assert same(*results)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(TrainingError, match="requires a gradient"):
        nb.checkpoint_plan(convolutions().requires_grad_(False), (IMAGES,), "1GiB")
    with pytest.raises(UsageError, match="scripted"):
        nb.checkpoint_plan(torch.jit.script(nn.Linear(2, 2)), (torch.zeros(1, 2),), "1GiB")
    with pytest.raises(UsageError, match="at least one byte"):
        nb.checkpoint_plan(convolutions(), (IMAGES,), 0)
