"""A model or loss that fails is told as that, with its own error; only what cannot be planned is told as such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import narrowboat as nb
from narrowboat.errors import LossError, TrainingError
from narrowboat.train.failures import failure_of, failures_named
from train_kit import copy_of, cross_entropy, mlp
from train_step_kit import adam, same, vectors

pytestmark = pytest.mark.usefixtures("small_things_count")
CANNOT_BE_PLANNED = "losses that differentiate inside"


def said_of(model: nn.Module, loss_fn: Any, batch: Any) -> tuple[str, BaseException | None]:
    before = copy_of(model)
    step = nb.train_step(model, loss_fn, adam(model), budget="1GiB")
    with pytest.raises(TrainingError) as raised:
        step(*batch)
    assert same(model, before)
    assert "\n" not in str(raised.value)
    return str(raised.value), raised.value.__cause__


def key_error(out: Tensor, y: Tensor) -> Tensor:
    return {}["nothing"]


def type_error(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, "classes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss_fn", "narrow_by", "cause", "words"),
    [
        (key_error, 0, KeyError, "KeyError: 'nothing'"),
        (type_error, 0, TypeError, "must be Tensor, not str"),
        (cross_entropy, 1, RuntimeError, "shapes cannot be multiplied"),
        (F.cross_entropy, 1, RuntimeError, "shapes cannot be multiplied"),
    ],
)
def test_an_error_of_the_model_or_loss_is_the_cause(
    loss_fn: Any, narrow_by: int, cause: type[Exception], words: str
) -> None:
    ((x, y),) = vectors(16)
    said, why = said_of(mlp(), loss_fn, (x[:, narrow_by:], y))
    assert said.startswith("the model (or loss) fails on this batch")
    assert words in said and CANNOT_BE_PLANNED not in said
    assert isinstance(why, cause)


def test_batch_norm_of_one_sample_is_told_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(32, 10), nn.BatchNorm1d(10))
    said, _ = said_of(model, F.cross_entropy, vectors(1)[0])
    assert "larger batch" in said and "batch_norm='frozen'" in said


class WithPenalty(nn.Module):
    """The output of a network, and the gradient of it by its inputs, found inside."""

    def __init__(self, find: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.find = mlp(), find

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.find(self.net, x).pow(2).sum()


def by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]


def by_autograd_with_gradients_on(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return by_autograd(net, x)


def by_func(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda each: net(each).sum())(x)


@pytest.mark.parametrize("find", [by_autograd, by_autograd_with_gradients_on, by_func])
@pytest.mark.parametrize("loss_fn", [cross_entropy, F.cross_entropy], ids=["a function", "torch's"])
def test_a_loss_that_differentiates_inside_is_told_so(find: Any, loss_fn: Any) -> None:
    said, _ = said_of(WithPenalty(find), loss_fn, vectors(16)[0])
    assert CANNOT_BE_PLANNED in said and "plain PyTorch" in said


def test_a_gradient_penalty_beside_the_model_is_told_so_too() -> None:
    model = mlp()

    def penalised(out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(out, y) + by_autograd(model, torch.ones(4, 32)).sum()

    assert CANNOT_BE_PLANNED in said_of(model, penalised, vectors(16)[0])[0]


def test_only_the_first_line_and_its_kind_are_told() -> None:
    assert str(failure_of(ValueError("one\ntwo"))) == "the model (or loss) fails on this batch: ValueError: one"
    assert str(failure_of(AssertionError(), "tried on 2")).endswith("this batch (tried on 2): AssertionError")


def test_errors_with_a_name_and_those_for_want_of_memory_go_through() -> None:
    for error in (LossError("mine"), MemoryError("no room"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, failures_named():
            raise error
        assert raised.value is error
    with pytest.raises(TrainingError, match="ZeroDivisionError"), failures_named():
        _ = 1 / 0
