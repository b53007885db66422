"""Weighted losses of micro-batches, and their gradients, sum to those of the batch, whatever is averaged over."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import LossError
from narrowboat.train.loss import LossPlan, call_loss, split_batch
from narrowboat.train.loss_trace import plan_loss

CLASSES, WEIGHT = 5, torch.tensor([0.1, 2.0, 1.0, 0.5, 3.0], dtype=torch.double)
SMOOTHED = {"label_smoothing": 0.1, "weight": WEIGHT}


class Tokens(nn.Module):
    """Classes first, as cross entropy wants them: ``(samples, classes, length)``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids)).transpose(1, 2)


class WithLabels(Tokens):
    """Loss inside, from labels, with or without the shift of next-token prediction."""

    def __init__(self, shift: bool) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids)
        if self.shift:
            logits, labels = logits[..., :-1], labels[:, 1:]
        return {"loss": F.cross_entropy(logits.transpose(1, 2).reshape(-1, CLASSES), labels.reshape(-1))}


def token_batch(samples: int = 7, length: int = 6, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(11, (samples, length), generator=generator)
    labels = torch.randint(CLASSES, (samples, length), generator=generator)
    for row in range(samples):
        labels[row, row % length :] = ignore_index  # row 0 and row 6 have no target at all
    return ids, labels


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_parts_sum_to_the_whole(
    model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, plan: LossPlan, parts: int, whole: Tensor | None = None
) -> None:
    if whole is None:
        whole = call_loss(model, loss_fn, inputs, targets)
    want = gradients(model, whole)
    total, got = torch.zeros((), dtype=torch.double), [torch.zeros_like(g) for g in want]
    counts: list[Any] = []
    for part in split_batch(inputs, targets, parts, plan):
        loss, count = plan.weighted(call_loss(model, loss_fn, part.inputs, part.targets), part.weight)
        counts.append(count)
        got = [a + b for a, b in zip(got, gradients(model, loss), strict=True)]
        total = total + loss.detach()
    factor = plan.correction(7, counts)
    torch.testing.assert_close(total * factor, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close([g * factor for g in got], want, rtol=1e-11, atol=1e-15)


LOSSES: dict[str, tuple[str, Callable[..., Any]]] = {
    "module": ("targets", nn.CrossEntropyLoss()),
    "class weights": ("targets", nn.CrossEntropyLoss(weight=WEIGHT)),
    "smoothing": ("targets", nn.CrossEntropyLoss(**SMOOTHED)),  # type: ignore[arg-type]
    "other ignored": ("targets", nn.CrossEntropyLoss(ignore_index=2)),
    "function": ("targets", F.cross_entropy),
    "partial": ("targets", partial(partial(F.cross_entropy, ignore_index=3), weight=WEIGHT)),
    "nll": ("targets", lambda out, y: nn.NLLLoss()(out.log_softmax(1), y)),
    "lambda": ("targets", lambda out, y: F.cross_entropy(out.transpose(1, 2).reshape(-1, CLASSES), y.flatten())),
    "lambda, weighted": ("targets", lambda out, y: F.cross_entropy(out, y, weight=WEIGHT)),
    "sum": ("sum", nn.CrossEntropyLoss(reduction="sum")),
    "sum inside": ("sum", lambda out, y: F.cross_entropy(out, y, reduction="sum")),
    "pair": ("pair", lambda out, y: (F.cross_entropy(out, y, reduction="sum"), (y >= 0).sum())),
}


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_token_losses_are_weighted_by_what_they_average_over(name: str, parts: int) -> None:
    rule, loss_fn = LOSSES[name]
    model = Tokens().double()
    ignored = getattr(loss_fn, "ignore_index", getattr(loss_fn, "keywords", {}).get("ignore_index", -100))
    ids, labels = token_batch(ignore_index=ignored)
    plan = plan_loss(model, loss_fn, ids, labels)
    assert plan.rule == rule and plan.why
    result = loss_fn(model(ids), labels)
    whole = result[0] / result[1] if rule == "pair" else result
    assert_parts_sum_to_the_whole(model, loss_fn, ids, labels, plan, parts, whole)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("first_ignored", [True, False])
def test_labels_inside_the_batch_are_found_shifted_or_not(shift: bool, first_ignored: bool) -> None:
    model = WithLabels(shift).double()
    ids, labels = token_batch()
    if first_ignored:
        labels[:, 0] = -100  # then a shift cannot be told from the labels that are kept
    batch = {"input_ids": ids, "labels": labels}
    plan = plan_loss(model, None, batch, None)
    assert plan.rule == "targets" and ("shifted" in plan.why) is shift
    assert_parts_sum_to_the_whole(model, None, batch, None, plan, 3)


@pytest.mark.parametrize(
    "loss_fn",
    [nn.MSELoss(), F.smooth_l1_loss, lambda out, y: (out - y).abs().mean(), nn.CrossEntropyLoss(weight=WEIGHT)],
    ids=["module", "function", "lambda", "probabilities"],
)
def test_other_losses_are_weighted_by_samples(loss_fn: Any) -> None:
    model = nn.Linear(3, CLASSES).double()
    x, y = torch.randn(7, 3, dtype=torch.double), torch.rand(7, CLASSES, dtype=torch.double).softmax(1)
    plan = plan_loss(model, loss_fn, x, y)
    assert plan.rule == "samples"
    assert_parts_sum_to_the_whole(model, loss_fn, x, y, plan, 3)


def test_a_count_of_the_users_goes_first() -> None:
    def masked(out: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
        target, mask = y
        return ((out - target).square() * mask).sum() / mask.sum()

    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3, dtype=torch.double), torch.randn(7, 2, dtype=torch.double)
    mask = (torch.arange(14).view(7, 2) % 3 > 0).double()
    plan = plan_loss(model, masked, x, (y, mask), count=lambda inputs, targets: targets[1].sum())
    assert plan.rule == "count"
    assert_parts_sum_to_the_whole(model, masked, x, (y, mask), plan, 4)


def test_planning_leaves_the_model_and_the_random_stream_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, CLASSES))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    plan_loss(model, lambda out, y: F.cross_entropy(out, y), torch.randn(6, 3), torch.randint(CLASSES, (6,)))
    torch.set_rng_state(state)
    want = torch.rand(1)
    torch.set_rng_state(state)
    x, y = torch.ones(6, 3), torch.zeros(6, dtype=torch.long)
    plan_loss(model, lambda out, y: F.cross_entropy(out, y), x, y)
    assert torch.equal(torch.rand(1), want) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    model, x, y = nn.Linear(3, 4), torch.randn(4, 3), torch.randint(4, (4,))
    with pytest.raises(LossError, match="reduction='none'"):
        plan_loss(model, nn.CrossEntropyLoss(reduction="none"), x, y)
    with pytest.raises(LossError, match=r"scalar tensor .*shape \(4,\)"):
        plan_loss(model, lambda out, y: out.sum(1), x, y)
    with pytest.raises(LossError, match="it is a float"):
        plan_loss(model, lambda out, y: 1.5, x, y)
    with pytest.raises(LossError, match="no loss"):
        call_loss(nn.Identity(), None, ({"loss": None},), None)
