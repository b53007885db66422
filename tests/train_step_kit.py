"""Training steps at a share of the plain step's activations, and the loop that everybody writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowboat.train.step import TrainStep, train_step
from train_kit import budget_of, copy_of, cross_entropy, largest_difference

Batches = list[tuple[Tensor, Tensor]]


def vectors(*sizes: int, dtype: torch.dtype = torch.float32) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 32, generator=generator, dtype=dtype), torch.randint(0, 10, (n,), generator=generator))
        for n in sizes
    ]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


class GlobalNorm(torch.optim.SGD):
    """Steps by the norm of all gradients: not per parameter."""

    def step(self, closure: Any = None) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad / norm)


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
    before: Callable[[int], Any] = lambda number: None,
    after: Callable[[int], Any] = lambda number: None,
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


def stepped(step: TrainStep, batches: Batches, before: Callable[[int], Any] = lambda number: None) -> list[float]:
    torch.manual_seed(2)
    losses = []
    for number, (x, y) in enumerate(batches):
        before(number)
        losses.append(step(x, y).item())
    return losses


def same(a: nn.Module, b: nn.Module) -> bool:
    return largest_difference(a, b) == 0


def unchanged(model: nn.Module, step: TrainStep, batch: tuple[Tensor, Tensor], error: type[Exception]) -> str:
    """Make a step that fails; nothing may move. Gives what was said."""
    before, state = copy_of(model), torch.get_rng_state()
    known = set(step.optimizer.state_dict()["state"])
    with pytest.raises(error) as raised:
        step(*batch)
    assert same(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(step.optimizer.state_dict()["state"]) == known
    assert all(parameter.grad is None for parameter in model.parameters())
    return str(raised.value)
