"""Training while the budget changes, memory running out in the middle of a step, and which technique comes first."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import narrowboat as nb
from inference_kit.children import Emit
from narrowboat.errors import BudgetError, TrainingError
from narrowboat.profile.warmup import warm_up
from narrowboat.quantities import format_bytes
from papers_kit.check import Bench, Measurement
from training_kit.measure import digest

_WIDTH, _DEPTH, _ROWS = 256, 8, 256  # of the tower; rows are times the batch
_BESIDE = 1 << 20  # bytes: a refusal names the smallest budget to about as much
_OVER = 1 << 20  # bytes by which resident memory may pass a budget: it is told in pages, and looked at between kernels
_WAY = (1.0, 0.35, 0.7, 0.15, 0.0, 0.5)  # of the room between the smallest budget and the plain step's
_EACH = 2  # steps under each: the first finds the heap as the budget before has left it
_SHARES = (0.8, 0.6, 0.4, 0.25, 0.12, 0.03)
_CLOSE = 1e-9  # relative, in float64


def adapting(bench: Bench) -> Measurement:
    """A budget for every step, another each time, beside the plain steps; and the plans from much to little."""
    batch = bench.effort.adapt_batch
    return bench.apart("adapting", partial(_adapt, batch), 400) | bench.apart("order", partial(_plans, batch), 300)


class _Tower(nn.Module):
    """Small weights and large activations: what a budget for training is about."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.LayerNorm(_WIDTH), nn.Tanh()) for _ in range(_DEPTH)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _setup(batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """In float64: what differs is rounding."""
    torch.set_num_threads(1)
    warm_up()
    torch.manual_seed(0)
    rows = batch * _ROWS
    x, y = (torch.randn(rows, _WIDTH, dtype=torch.float64) for _ in range(2))
    return _Tower().double(), x, y


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def _adapt(batch: int, emit: Emit) -> None:
    model, inputs, targets = _setup(batch)
    plain = copy.deepcopy(model)
    step = nb.train_step(model, F.mse_loss, _sgd(model), budget="4GiB")
    plan = step.prepare(inputs, targets)
    least, most = plan.min_budget, plan.plain_peak
    budgets = [int(least + share * (most - least) + _BESIDE) for share in _WAY]
    found, plans = [], []
    for budget in budgets:
        step.budget = budget
        found += [float(step(inputs, targets)) for _ in range(_EACH)]
        plans.append(f"{step.plan.parts} x {step.plan.micro_batch}")
    before = step.plan
    found.append(float(step(inputs, targets)))
    records = list(step.report().steps)[: _EACH * len(budgets)]
    over = [max(record.measured_peak - record.budget, 0) for record in records]
    losses = _plain_losses(plain, inputs, targets, len(found))
    distance = max(_apart(a.detach(), b.detach()) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    emit(
        "measured",
        steps=len(found),
        least=format_bytes(least),
        most=format_bytes(most),
        plans=", ".join(plans),
        losses_agree=all(abs(a - b) <= _CLOSE * abs(b) for a, b in zip(found, losses, strict=True)),
        distance=f"{distance:.0e}",
        weights_agree=distance <= _CLOSE,
        first_over=format_bytes(max(over[::_EACH])),
        settled_over=format_bytes(max(over[_EACH - 1 :: _EACH])),
        allowed=format_bytes(_OVER),
        overs=over,
        settles_within=max(over[_EACH - 1 :: _EACH]) <= _OVER,
        each_budget_followed=[record.budget for record in records] == [b for b in budgets for _ in range(_EACH)],
        plan_kept=step.plan is before,
    )


def _plain_losses(plain: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, steps: int) -> list[float]:
    """Of so many plain steps; afterwards, so that what they leave in the heap is nobody's."""
    optimizer = _sgd(plain)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(plain(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def _plans(batch: int, emit: Emit) -> None:
    """Which technique the planner turns to first, and what accumulation alone would cost at the same budgets.

    Times are compared over the plain step's of the same study: two studies are timed in different moments.
    """
    model, inputs, targets = _setup(batch)
    told: dict[str, list[Any]] = {}
    least = most = 0
    for name, allowed in (("ours", None), ("accumulate", {"accumulate"})):
        fresh = copy.deepcopy(model)
        step = nb.train_step(fresh, F.mse_loss, _sgd(fresh), budget="4GiB", techniques=allowed)
        plan = step.prepare(inputs, targets)
        if name == "ours":
            least, most = plan.min_budget, plan.plain_peak
        rows: list[Any] = []
        for share in _SHARES:
            step.budget = int(least + share * (most - least))
            try:
                plan = step.prepare(inputs, targets)
                rows.append({"parts": plan.parts, "slowdown": plan.predicted_slowdown, "schedule": plan.schedule})
            except BudgetError:
                rows.append(None)
        told[name] = rows
    emit("measured", **order_told(told["ours"], told["accumulate"]))


def order_told(ours: list[Any], alone: list[Any]) -> Measurement:
    """What comes first on the way down, and accumulation alone beside it; pure."""
    kinds = []
    for row in (row for row in ours if row is not None):
        kind = "micro-batches" if row["parts"] > 1 else ""
        if _recomputes(row["schedule"]):
            kind += " and recomputing" if kind else "recomputing"
        kinds.append(kind or "plain")
    turned = next((kind for kind in kinds if kind != "plain"), "plain")
    beside = [a["slowdown"] / o["slowdown"] for o, a in zip(ours, alone, strict=True) if o and a]
    deeper = sum(o is not None and a is None for o, a in zip(ours, alone, strict=True))
    return {
        "kinds": ", ".join(kinds),
        "first": turned,
        "accumulates_first": turned == "micro-batches",
        "both_are_used": any("micro" in kind for kind in kinds) and any("recomputing" in kind for kind in kinds),
        "alone_over_ours": max(beside) if beside else 1.0,
        "budgets": len(kinds),
        "deeper": deeper,
    }


def _recomputes(schedule: str) -> bool:
    return any(word in schedule for word in ("recompute", "replay", "drop"))


def failing(bench: Bench) -> Measurement:
    """Memory that is refused in the middle of a step; and a loss that differentiates inside."""
    return bench.apart("failing", _fail, 200)


_MANY = 2048  # rows: a step has to have something to give up
_WANTED: list[int] = []  # bytes, taken once: what a step changes in the model itself is put back when it is given up


class _Hungry(nn.Module):
    """Once, asks in the middle for more memory than there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 3 and _WANTED:
                torch.empty(_WANTED.pop(), dtype=torch.uint8)
        return x


class _Penalty(nn.Module):
    """A network whose output holds a gradient by its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        (by_inputs,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        found: torch.Tensor = self.net(x) + by_inputs.pow(2).sum()
        return found


def _fail(emit: Emit) -> None:
    torch.set_num_threads(1)
    warm_up()
    torch.manual_seed(0)
    model = _Hungry().double()
    plain = copy.deepcopy(model)
    x, y = (torch.randn(_MANY, 512, dtype=torch.float64) for _ in range(2))
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(plain(x), y).backward()
        optimizer.step()
    step = nb.train_step(model, F.mse_loss, torch.optim.SGD(model.parameters(), 0.1), budget="1GiB")
    step(x, y)
    _WANTED.append(16 << 30)
    step(x, y)
    repeated = step.report().steps[-1].repeated
    step(x, y)
    distance = max(_apart(a.detach(), b.detach()) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    refused = ""
    try:
        inner = _Penalty()
        other = nb.train_step(inner, F.mse_loss, torch.optim.SGD(inner.parameters(), 0.1), budget="1GiB")
        other(torch.randn(8, 16), torch.randn(8, 4))
    except TrainingError as error:
        refused = str(error)
    emit(
        "measured",
        repeated=repeated,
        done_again=repeated >= 1,
        distance=f"{distance:.0e}",
        as_if_nothing=distance <= _CLOSE,
        same_bits=digest(model.parameters()) == digest(plain.parameters()),
        second_order=not refused,
        refused=refused[:120] or "trained",
    )
