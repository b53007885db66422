"""The loss without its logits: the same loss and gradients in fewer bytes, and a reason where it cannot be had."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.train.low_memory import LEAST_CLASSES, LowMemoryLoss
from narrowboat.train.step import train_step

pytestmark = pytest.mark.usefixtures("small_things_count")
CLASSES = LEAST_CLASSES
TECHNIQUES = ("recompute", "reduce", "compact", "accumulate")


def classifier(last: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), last or nn.Linear(16, CLASSES))


def batch(samples: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, CLASSES, (samples,), generator=generator)
    targets[::5] = 7
    return torch.randn(samples, 8, generator=generator), targets


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def plain(model: nn.Module, loss_fn: Any, inputs: Any, targets: Any) -> tuple[Tensor, list[Tensor]]:
    model = copy.deepcopy(model)
    loss = loss_fn(model(inputs), targets) if loss_fn is not None else model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients_of(model)


def stepped(model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, *more: str, **options: Any) -> Any:
    """Loss and gradients in the smallest budget there is, and the plan."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    techniques = (*TECHNIQUES, *more)
    with train_step(
        model, loss_fn, optimizer, budget="8GiB", techniques=techniques, adapt=False, enforce=False, **options
    ) as step:
        roomy = step.prepare(inputs, targets)
        step.budget = roomy.min_budget
        loss = step.backward(inputs, targets)
        assert step.report().steps[-1].departed == ""
        return loss, gradients_of(model), roomy


def same(ours: tuple[Tensor, list[Tensor]], theirs: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(ignore_index=7, weight=torch.linspace(0.5, 2, CLASSES)),
        partial(F.cross_entropy, reduction="sum", ignore_index=7),
    ],
    ids=["mean", "weighted and ignored", "sum"],
)
def test_loss_and_gradients_are_the_plain_ones(loss_fn: Any) -> None:
    model, (inputs, targets) = classifier(), batch()
    loss, gradients, plan = stepped(model, loss_fn, inputs, targets, "low_memory")
    same((loss, gradients), plain(model, loss_fn, inputs, targets))
    assert not [reason for reason in plan.refused if "low_memory" in reason]


def test_the_plan_counts_no_logits() -> None:
    model, (inputs, targets) = classifier(), batch(512)
    *_, with_logits = stepped(model, F.cross_entropy, inputs, targets)
    *_, without = stepped(model, F.cross_entropy, inputs, targets, "low_memory")
    logits = 512 * CLASSES * 4
    assert without.plain_peak < with_logits.plain_peak - logits


def test_a_causal_language_model_shifts_and_ignores_as_before() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=CLASSES, n_embd=16, n_layer=2, n_head=2, n_positions=32, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, CLASSES, (6, 20), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[2, 8:] = -100
    inputs = {"input_ids": ids, "labels": labels}
    loss, gradients, plan = stepped(model, None, inputs, None, "low_memory")
    same((loss, gradients), plain(model, None, inputs, None))
    assert not [reason for reason in plan.refused if "low_memory" in reason]


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 0.5


@pytest.mark.parametrize(
    ("model", "loss_fn", "reason"),
    [
        (_Scaled(), F.cross_entropy, "something happens to the logits"),
        (
            classifier(nn.Linear(16, 10)),
            lambda output, y: F.cross_entropy(output, y % 10),
            "is not nn.CrossEntropyLoss",
        ),
        (classifier(), nn.CrossEntropyLoss(label_smoothing=0.1), "label smoothing"),
        (classifier(nn.LayerNorm(16)), F.cross_entropy, "the last layer is a LayerNorm"),
        (classifier(nn.Linear(16, 8)), F.cross_entropy, "8 logits per row are too few"),
    ],
    ids=["scaled logits", "own loss", "smoothing", "no linear layer", "few classes"],
)
def test_where_it_does_not_apply_the_reason_is_told(model: nn.Module, loss_fn: Any, reason: str) -> None:
    inputs, targets = batch(8)
    made, told = LowMemoryLoss.of(model, loss_fn, inputs, targets % 8)
    assert made is None
    assert told.startswith("low_memory: ") and reason in told


def test_the_plan_repeats_the_reason_and_the_step_is_the_plain_one() -> None:
    model, (inputs, targets) = _Scaled(), batch()
    loss, gradients, plan = stepped(model, F.cross_entropy, inputs, targets, "low_memory")
    same((loss, gradients), plain(model, F.cross_entropy, inputs, targets))
    assert any("something happens to the logits" in reason for reason in plan.refused)


def test_the_model_gives_logits_again_afterwards() -> None:
    model, (inputs, targets) = classifier(), batch()
    before, state = model(inputs), dict(model[-1].__dict__)
    made, _ = LowMemoryLoss.of(model, F.cross_entropy, inputs, targets)
    assert made is not None
    made(inputs, targets).backward()
    assert torch.equal(model(inputs), before)
    assert dict(model[-1].__dict__) == state
