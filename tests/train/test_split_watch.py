"""What held for the first batch is looked at again: a split that stops being exact stops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from narrowboat.errors import BudgetError, TrainingError
from narrowboat.train.split_watch import SplitWatch
from narrowboat.train.step import train_step

TOKENS = torch.randint(1, 50, (16, 12), generator=torch.Generator().manual_seed(0))


def padded(tokens: torch.Tensor) -> torch.Tensor:
    lengths = torch.arange(len(tokens)) % 9 + 2
    return tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], 0)


def masked_mean(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    each = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    mask = (targets != 0).double()
    return (each * mask).sum() / mask.sum()


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 50)).double()


def test_it_is_due_at_the_first_powers_of_two_and_when_samples_begin_to_differ() -> None:
    watch = SplitWatch(TOKENS, TOKENS)
    assert [watch.due(TOKENS, TOKENS) for _ in range(9)] == [True, True, False, True, False, False, False, True, False]
    assert watch.due(padded(TOKENS), TOKENS)
    assert not watch.due(padded(TOKENS), TOKENS)


def test_a_masked_mean_is_not_split_from_the_first_padded_batch_on() -> None:
    model, plain = language_model(), language_model()
    ours, theirs = torch.optim.SGD(model.parameters(), 0.5), torch.optim.SGD(plain.parameters(), 0.5)
    # Without recomputation less than the plain step's bytes means micro-batches.
    step = train_step(model, masked_mean, ours, budget="1GiB", adapt=False, techniques=["accumulate"])
    step.budget = int(step.prepare(TOKENS, TOKENS).plain_peak * 0.99)
    parts = []
    for number in range(6):
        batch = TOKENS if number < 3 else padded(TOKENS.roll(number, 0))
        theirs.zero_grad()
        expected = masked_mean(plain(batch), batch)
        expected.backward()
        theirs.step()
        try:
            loss = step(batch, batch)
        except BudgetError as error:
            assert number == 3 and "not split" in str(error)
            step.budget = "1GiB"
            loss = step(batch, batch)
        parts.append(step.plan.parts)
        assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert min(parts[:3]) > 1 and max(parts[3:]) == 1
    assert any("no longer split" in change for _, change in step.report().changes)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def number_regression(kind: str, number: int) -> tuple[torch.Tensor, Any]:
    """Inputs and targets; from the seventh batch on samples differ in how much of them counts."""
    draw = torch.Generator().manual_seed(number)
    x = torch.randn(16, 12, 4, generator=draw).double()
    lengths = torch.arange(16) % 9 + 2 if number >= 6 else torch.full((16,), 12)
    mask = torch.arange(12) < lengths[:, None]
    y = x.sum(-1)
    weights = torch.where(lengths < 12, lengths / 12, 1.0).double()
    given = {"float": (y, mask.double()), "bool": (y, mask), "lengths": (y, lengths), "weights": (y, weights)}
    return x, given.get(kind, y.masked_fill(~mask, torch.nan))


def weighed(out: torch.Tensor, targets: Any) -> torch.Tensor:
    y, mask = targets if isinstance(targets, tuple) else (targets.nan_to_num(), ~targets.isnan())
    if mask.dim() == 1 and not mask.is_floating_point():
        mask = torch.arange(12) < mask[:, None]
    elif mask.dim() == 1:
        mask = mask[:, None].expand_as(y)
    mask = mask.double()
    return ((out.squeeze(-1) - y).square() * mask).sum() / mask.sum()


@pytest.mark.parametrize("kind", ["float", "bool", "lengths", "weights", "nan"])
def test_masks_of_any_kind_that_begin_later_are_looked_at_when_they_do(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    step = train_step(model, weighed, torch.optim.SGD(model.parameters(), 0.1), budget="1GiB", micro_batches=4)
    for number in range(6):  # the check is due before the 2nd, 3rd, 5th and 9th
        x, targets = number_regression(kind, number)
        with torch.no_grad():
            expected = float(weighed(model(x), targets))
        assert float(step(x, targets)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(TrainingError, match="micro_batches=4 would not give"):
        step(*number_regression(kind, 6))


def test_the_batch_that_meets_a_new_plan_is_looked_at_too() -> None:
    model = language_model()
    step = train_step(model, masked_mean, torch.optim.SGD(model.parameters(), 0.5), budget="1GiB", micro_batches=4)
    for _ in range(3):
        step(TOKENS, TOKENS)
    step.budget = "1023MiB"  # so that this batch is planned for anew
    with pytest.raises(TrainingError, match="micro_batches=4 would not give"):
        step(padded(TOKENS), padded(TOKENS))


def test_micro_batches_that_stop_being_exact_are_an_error_and_nothing_is_changed() -> None:
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    step = train_step(model, masked_mean, optimizer, budget="1GiB", micro_batches=4)
    for _ in range(3):
        step(TOKENS, TOKENS)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(TrainingError, match="micro_batches=4 would not give the gradients of the whole batch"):
        step(padded(TOKENS), padded(TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_term_that_is_switched_on_later_ends_the_split() -> None:
    weight = {"now": 0.0}

    def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        spread = logits.mean((1, 2)).logsumexp(0)  # over the samples: it couples them
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + weight["now"] * spread

    model = language_model()
    step = train_step(model, loss_fn, torch.optim.SGD(model.parameters(), 0.1), budget="1GiB", micro_batches=2)
    step(TOKENS, TOKENS)
    weight["now"] = 1.0
    with pytest.raises(TrainingError, match="micro_batches=2"):
        step(TOKENS, TOKENS)
