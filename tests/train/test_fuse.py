"""Fused blocks: chosen by measurement, seen by the tape as one operator, the same gradients, undone at the end."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowboat.errors import UsageError
from narrowboat.train import fuse
from narrowboat.train.fuse import Fusion
from narrowboat.train.step import train_step

pytestmark = pytest.mark.usefixtures("small_things_count")
TECHNIQUES = ("recompute", "reduce", "compact", "accumulate")


class Curve(nn.Module):
    """The activation of GPT-2 as it is written there: eight operators."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class Norm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), Curve(), Norm(64), nn.Linear(64, 64), Curve(), nn.Linear(64, 4))


def batch(samples: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 16, generator=generator), torch.randn(samples, 4, generator=generator)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def forward_of(model: nn.Module) -> Any:
    return lambda inputs, targets: F.mse_loss(model(inputs), targets)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever can be fused is, however the clock of a busy machine runs."""
    monkeypatch.setattr(fuse, "_FASTER", 0.0)
    yield


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["smallest budget", "all the room"])
def test_gradients_are_the_plain_ones_and_the_pass_keeps_to_its_plan(share: float) -> None:
    model, (inputs, targets) = network(), batch(1024)
    alone = copy.deepcopy(model)
    F.mse_loss(alone(inputs), targets).backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    options: dict[str, Any] = {"adapt": False, "enforce": False, "micro_batches": 1}
    with train_step(model, F.mse_loss, optimizer, budget="8GiB", techniques=(*TECHNIQUES, "fuse"), **options) as step:
        plan = step.prepare(inputs, targets)
        fused_bytes = plan.plain_peak
        step.budget = plan.budget if share else plan.min_budget
        step.backward(inputs, targets)
        record = step.report().steps[-1]
        assert record.departed == ""
        assert (record.replays > 0) == (share == 0.0)
        assert sum(name == "narrowboat::fused" for name, *_ in _signature(step, inputs, targets)) == 3
    for ours, theirs in zip(gradients(model), gradients(alone), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    with train_step(alone, F.mse_loss, optimizer_of(alone), budget="8GiB", techniques=TECHNIQUES, **options) as step:
        assert fused_bytes < step.prepare(inputs, targets).plain_peak


def _signature(step: Any, inputs: Any, targets: Any) -> Any:
    return step._preparation.planner(inputs, targets).chain(len(inputs)).tape.signature()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.0)


@pytest.mark.usefixtures("always")
def test_one_row_and_other_callers_get_the_same_and_all_is_undone() -> None:
    model, (inputs, targets) = network(), batch()
    plain, one = model(inputs), model(inputs[:1])
    fusion = Fusion(model)
    fusion.prepare(forward_of(model), inputs, targets)
    assert set(fusion.fused) == {"1", "2", "4"}
    torch.testing.assert_close(model(inputs), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(inputs[:1]), one, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(model(inputs), plain)  # an evaluation has every bit
    assert torch.equal(copy.deepcopy(model)(inputs), plain)  # and so has a copy
    fusion.close()
    assert torch.equal(model(inputs), plain)


class _Counting(Curve):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class _Noisy(Curve):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5))


class _InPlace(Curve):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mul_(2)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (_Counting(), "changes its own attributes"),
        (_Noisy(), "random numbers"),
        (_InPlace(), "writes to tensors"),
        (nn.Sequential(nn.ReLU()), "a single operator"),
        (nn.Sequential(nn.BatchNorm1d(64), nn.ReLU()), "writes to tensors"),
    ],
    ids=["attributes", "random", "in place", "single", "running statistics"],
)
def test_what_a_compiled_operator_could_not_do_right_stays_as_it_is(block: nn.Module, reason: str) -> None:
    model, (inputs, targets) = nn.Sequential(nn.Linear(16, 64), block, nn.Linear(64, 4)), batch()
    fusion = Fusion(model)
    fusion.prepare(forward_of(model), inputs, targets)
    assert not fusion.fused
    assert reason in fusion.reasons[0]
    assert block._compiled_call_impl is None
    assert getattr(block, "calls", 0) == 0  # and trying it out left no trace


def test_the_plan_tells_why_nothing_was_fused() -> None:
    model, (inputs, targets) = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), batch()
    with train_step(model, F.mse_loss, optimizer_of(model), budget="8GiB", techniques="fuse", adapt=False) as step:
        plan = step.prepare(inputs, targets)
    assert any(reason.startswith("fuse: no block") for reason in plan.refused)


def test_without_a_compiler_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    model = network()
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        train_step(model, F.mse_loss, optimizer_of(model), techniques="fuse")
