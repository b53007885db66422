"""Tapes of two batch sizes give that of a third."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from narrowboat.train.measure.fake import fake_walk
from narrowboat.train.measure.fit import alike, at_batch, with_times
from narrowboat.train.measure.real import real_walk
from narrowboat.train.measure.study import study
from train_kit import CASES, cross_entropy


@pytest.mark.parametrize("name", ["mlp", "gpt", "group and instance norm", "gathering"])
def test_the_fit_is_the_pass_at_another_size(name: str) -> None:
    case = CASES[name]
    model = case.model()
    x, y = case.batches(1)[0]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(model(a), b)

    small, large, direct = (fake_walk(model, loss, x, y, size) for size in (16, 20, 48))
    assert alike(small, large)
    fitted = at_batch(small, large, 48)
    assert fitted.signature() == direct.signature()
    assert [s.nbytes for s in fitted.storages] == [s.nbytes for s in direct.storages]
    assert [(s.saved_at, s.dies) for s in fitted.storages] == [(s.saved_at, s.dies) for s in direct.storages]
    assert [event.live for event in fitted.backward] == [event.live for event in direct.backward]
    assert [s.shrinks > 0 for s in fitted.storages] == [s.shrinks > 0 for s in direct.storages]


class Pairs(nn.Module):
    """Compares each sample with each other one: its bytes grow with the square of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return torch.tanh(x @ x.T)


def test_bytes_that_grow_with_the_square_are_never_underestimated() -> None:
    model, x = Pairs(), torch.randn(64, 8)

    def loss(a: Tensor, _: Tensor) -> Tensor:
        return model(a).mean()

    made = study(model, loss, x, torch.zeros(64))
    for size in (64, 48, 32, 16, 8, 4, 2):
        direct, fitted = fake_walk(model, loss, x, torch.zeros(64), size), made.tape(size)
        assert fitted.saved_bytes >= direct.saved_bytes
    assert made.tape(64).saved_bytes == fake_walk(model, loss, x, torch.zeros(64), 64).saved_bytes


def test_durations_grow_with_the_samples_and_keep_their_order() -> None:
    case = CASES["mlp"]
    model = case.model()
    x, y = case.batches(1)[0]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return cross_entropy(model(a), b)

    timed = real_walk(model, loss, x, y, 8)
    tape = with_times(fake_walk(model, loss, x, y, 16), timed)
    assert [op.seconds for op in tape.ops] == [2 * op.seconds for op in timed.ops]
    assert tape.backward_seconds == 2 * timed.backward_seconds
    moments = [event.seconds for event in tape.backward]
    assert moments == sorted(moments) and moments[-1] > 0
