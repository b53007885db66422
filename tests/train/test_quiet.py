"""Passes on fake tensors print nothing; what the user's model warns of in real passes stays, once."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import narrowboat as nb
from narrowboat.errors import TrainingError
from narrowboat.train.quiet import quiet_on_fake_tensors
from train_kit import cross_entropy, mlp
from train_step_kit import adam, vectors

LOG = "torch._subclasses.fake_tensor"


@quiet_on_fake_tensors
def warning(x: Tensor) -> Tensor:
    warnings.warn("look here", UserWarning, stacklevel=1)
    logging.getLogger(LOG).error("no such shape")
    return x + 1


def test_a_call_on_fake_tensors_is_quiet_and_a_call_on_real_ones_is_not(caplog: pytest.LogCaptureFixture) -> None:
    before = list(warnings.filters), torch.is_warn_always_enabled()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with FakeTensorMode():
            assert isinstance(warning(torch.ones(2)), FakeTensor)
        assert not told and not caplog.records
        warning(torch.ones(2))
        assert len(told) == len(caplog.records) == 1
    assert (list(warnings.filters), torch.is_warn_always_enabled()) == before


def test_it_is_loud_again_after_an_error() -> None:
    @quiet_on_fake_tensors
    def failing() -> None:
        raise KeyError("mine")

    before = list(warnings.filters)
    with FakeTensorMode(), pytest.raises(KeyError):
        failing()
    assert list(warnings.filters) == before
    assert not logging.getLogger(LOG).filters


class Warns(nn.Module):
    """Warns in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn(f"fake {isinstance(x, FakeTensor)}", UserWarning, stacklevel=1)
        return self.net(x)


def test_a_model_is_heard_in_its_real_passes_only() -> None:
    model = Warns()
    (batch,) = vectors(16)
    step = nb.train_step(model, cross_entropy, adam(model), budget="1GiB")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step(*batch)
        nb.checkpoint_plan(model, batch[0], "1GiB")
    assert {str(each.message) for each in told} == {"fake False"}


def test_a_shape_that_does_not_fit_is_told_once_and_not_by_torch(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    ((x, y),) = vectors(16)
    with pytest.raises(TrainingError, match="shapes cannot be multiplied"):
        nb.train_step(model, nn.CrossEntropyLoss(), adam(model), budget="1GiB").prepare(x[:, 1:], y)
    with pytest.raises(TrainingError, match="shapes cannot be multiplied"):
        nb.checkpoint_plan(model, x[:, 1:], "1GiB")
    assert not [record for record in caplog.records if record.name.startswith("torch")]
