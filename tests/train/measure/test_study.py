"""What a study makes of passes that fake tensors tell wholly, nearly, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from narrowboat.train.measure.real import real_walk
from narrowboat.train.measure.study import study
from train_kit import CASES, cross_entropy


def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        torch.clear_autocast_cache()
        return cross_entropy(model(x), y)

    return loss


@pytest.mark.parametrize("name", ["lstm", "autocast", "mlp"])
def test_memory_that_only_kernels_know_of_counts(name: str) -> None:
    case = CASES[name]
    model = case.model()
    x, y = case.batches(1)[0]
    with case.context():
        made = study(model, loss_of(model), x, y)
        real = real_walk(model, loss_of(model), x, y, 16)
    assert made.source == "fake tensors"
    told = made.tape(16)
    assert told.signature() == real.signature()
    assert told.saved_bytes == pytest.approx(real.saved_bytes, rel=0.03)
    assert all(a.nbytes >= b.nbytes for a, b in zip(told.storages, real.storages, strict=True) if b.nbytes > 64)


class Asking(nn.Module):
    """Does something else when it is only being measured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out if isinstance(out, FakeTensor) else torch.tanh(out) * 2


def test_a_model_that_fools_fake_tensors_is_measured_on_real_samples() -> None:
    model = Asking()
    x, y = CASES["mlp"].batches(1)[0]
    made = study(model, loss_of(model), x, y)
    assert made.source.startswith("real samples")
    assert "aten::tanh" in [op.name for op in made.tape(len(x)).ops]


def test_a_model_that_reads_numbers_is_measured_on_real_samples() -> None:
    case = CASES["resnet"]
    model = case.model()
    x, y = case.batches(1)[0]
    made = study(model, loss_of(model), x, y)
    assert made.source.startswith("real samples")
    assert made.tape(8).saved_bytes == real_walk(model, loss_of(model), x, y, 8).saved_bytes


def test_timing_gives_whole_durations_that_grow_with_the_batch() -> None:
    case = CASES["mlp"]
    model = case.model()
    x, y = case.batches(1)[0]
    made = study(model, loss_of(model), x, y)
    guessed = made.seconds(48)
    assert not made.timed and guessed > 0
    made.time(model, loss_of(model), x, y, (2, 8))
    assert made.timed and made.seconds(48) >= made.seconds(8) > 0
    assert all(op.seconds > 0 for op in made.tape(48).ops)
