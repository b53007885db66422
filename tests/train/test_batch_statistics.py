"""Modules that couple samples, or move with each pass, are found; frozen ones stop and go back."""

from __future__ import annotations

import pytest
import torch
import torch.ao.nn.intrinsic.qat as qat
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

from narrowboat.errors import TrainingError
from narrowboat.train.batch_statistics import (
    frozen_batch_norm,
    modules_that_move_with_each_pass,
    modules_with_batch_statistics,
    not_for_lockstep,
)


class Own(nn.BatchNorm2d):
    pass


def test_modules_that_couple_samples_are_named_and_others_are_not() -> None:
    model = nn.ModuleDict(
        {
            "plain": nn.BatchNorm2d(2),
            "subclass": Own(2),
            "sync": nn.SyncBatchNorm(2),
            "lazy": nn.LazyBatchNorm1d(),
            "bare": nn.BatchNorm1d(2, track_running_stats=False).eval(),
            "resting": nn.BatchNorm3d(2).eval(),
            "scripted": torch.jit.script(nn.BatchNorm2d(2)),
            "instance": nn.InstanceNorm2d(2, track_running_stats=True),
            "group": nn.GroupNorm(1, 2),
            "layer": nn.LayerNorm(2),
            "observer": torch.ao.quantization.FakeQuantize(),
        }
    )
    found = modules_with_batch_statistics(model)
    assert found == ["plain", "subclass", "sync", "lazy", "bare", "scripted", "observer"]
    assert list(not_for_lockstep(model)) == ["scripted", "observer"]


def test_the_norm_inside_a_quantisation_aware_convolution_is_found() -> None:
    configuration = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    fused = qat.ConvBn2d(3, 4, 1, qconfig=configuration)
    assert set(modules_with_batch_statistics(fused)) == {"bn", "weight_fake_quant"}
    fused.apply(torch.ao.quantization.disable_observer)
    assert modules_with_batch_statistics(fused) == ["bn"]
    fused._enable_slow_path_for_better_numerical_stability = True
    assert list(not_for_lockstep(fused)) == [""]


def test_modules_that_move_with_each_pass_are_named() -> None:
    model = nn.ModuleDict(
        {
            "tracking": nn.InstanceNorm1d(2, track_running_stats=True),
            "instance": nn.InstanceNorm1d(2),
            "norm": spectral_norm(nn.Linear(2, 2)),
            "old": old_spectral_norm(nn.Linear(2, 2)),
            "linear": nn.Linear(2, 2),
        }
    )
    assert modules_that_move_with_each_pass(model) == ["tracking", "norm.parametrizations.weight.0", "old"]
    assert modules_that_move_with_each_pass(model.eval()) == []


def test_frozen_norms_use_their_running_statistics_and_wake_up_again() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.BatchNorm1d(4).eval())
    x, before = torch.randn(5, 3), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), frozen_batch_norm(model) as names:
        assert names == ["1"] and [module.training for module in model] == [True, False, True, False]
        model(x)
        raise KeyError
    assert [module.training for module in model] == [True, True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with (
        pytest.raises(TrainingError, match="no running statistics"),
        frozen_batch_norm(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False))),
    ):
        pass
