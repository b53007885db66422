"""What a replay would do besides computing is found before any plan is trusted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train_kit import copy_of
from train_step_kit import narrow, plain

LIBRARY = torch.library.Library("narrowboat_tests", "DEF")
LIBRARY.define("counted(Tensor x, Tensor count) -> Tensor")  # a lie: it writes to ``count``


def counted(x: Tensor, count: Tensor) -> Tensor:
    count.add_(1)
    return x * 2


LIBRARY.impl("counted", counted, "CPU")
LIBRARY.impl("counted", lambda x, count: torch.empty_like(x), "Meta")


class Front(nn.Module):
    """Before a trained part: something that moves a buffer and has no gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.BatchNorm2d(8)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.back = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6)))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.kind == "batch_norm":
            with torch.inference_mode():
                y = self.norm(y)
        elif self.kind == "instance_norm":
            with torch.inference_mode():
                mean, var = self.norm.running_mean, self.norm.running_var
                y = torch.instance_norm(y, None, None, mean, var, True, 0.1, 1e-5, False)
        elif self.kind == "update_stats":
            torch.batch_norm_update_stats(y.detach(), self.norm.running_mean, self.norm.running_var, 0.1)
        else:
            y = y + torch.ops.narrowboat_tests.counted(y.detach(), self.norm.running_mean)
        return self.head(F.relu(self.back(y.clone())).mean((2, 3)))


class Quantized(nn.Module):
    """What cannot be called again on plain memory lies in the midst of what can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.back = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(6)))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        rounded = torch.quantize_per_tensor(y.detach(), 0.1, 0, torch.qint8).dequantize()
        return self.head(self.back(y * rounded).mean((2, 3)))


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 3, 16, 16, generator=draw), torch.randint(10, (8,), generator=draw)) for _ in range(3)]


@pytest.mark.parametrize("kind", ["batch_norm", "instance_norm", "update_stats", "an operator that does not say so"])
def test_buffers_move_once_although_the_smallest_plan_computes_again(kind: str) -> None:
    torch.manual_seed(1)
    model = Front(kind)
    twin = copy_of(model)
    losses = plain(twin, batches())
    step = narrow(model, batches()[0])
    torch.manual_seed(2)
    assert [step(x, y).item() for x, y in batches()] == losses
    assert step.report().steps[-1].replays > 0
    for (name, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_does_not_run_again_is_kept_and_the_rest_is_recomputed() -> None:
    torch.manual_seed(1)
    model = Quantized()
    losses = plain(copy_of(model), batches())
    step = narrow(model, batches()[0])
    assert [step(x, y).item() for x, y in batches()] == losses
    assert step.report().steps[-1].replays > 0
    assert any("their replay gave other bits" in reason for reason in step.plan.refused)
