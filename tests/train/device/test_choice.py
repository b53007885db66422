"""Which device, and what a budget says for it and for the host; what cannot be is told in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowboat.errors import DeviceMemoryError, NoDeviceError, PinnedMemoryError, QuantityError, UsageError
from narrowboat.machine.memory import memory_limits
from narrowboat.train.device.choice import Amounts, check_batch, device_of
from narrowboat.train.step import TrainStep, train_step
from train_kit import cross_entropy, mlp
from train_step_kit import adam, vectors

MakeStep = Callable[..., TrainStep]
MIB = 1 << 20


def on_cuda() -> nn.Module:
    """A model that says it is on a GPU; nothing of it can be computed."""
    model = nn.Linear(4, 4)
    with FakeTensorMode():
        model.weight = nn.Parameter(torch.empty(4, 4, device="cuda"), requires_grad=False)
        model.bias = nn.Parameter(torch.empty(4, device="cuda"), requires_grad=False)
    return model


def a_step(budget: Any, **options: Any) -> TrainStep:
    model = mlp()
    return train_step(model, cross_entropy, adam(model), budget=budget, **options)


# -- the device ------------------------------------------------------------------------------------------------------


def test_a_model_on_the_cpu_needs_no_device(device: Any) -> None:
    assert device_of(mlp(), None) is None and device_of(mlp(), "cpu") is None
    assert device_of(mlp(), torch.device("cpu")) is None
    assert device_of(mlp(), device) is device
    assert device_of(mlp(), "emulated:1MiB").memory() == (MIB, MIB)


def test_devices_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"device='cpu', and the model is on cuda:0"):
        device_of(on_cuda(), "cpu")
    with pytest.raises(UsageError, match=r"is on cuda:0: move it there"):
        device_of(on_cuda(), "emulated:1MiB")
    with pytest.raises(UsageError, match="parameters are on cpu, cuda:0: train_step trains a model on one device"):
        device_of(nn.Sequential(on_cuda(), mlp()), None)
    for given in ("gpu", "mps", 7):
        with pytest.raises(UsageError):
            a_step("1GiB", device=given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("given", ["cuda", torch.device("cuda", 1)])
def test_without_a_gpu_that_is_said(given: Any) -> None:
    with pytest.raises(NoDeviceError, match="cannot be used"):
        a_step("1GiB", device=given)
    with pytest.raises(NoDeviceError, match="cannot be used"):
        device_of(on_cuda(), None)


# -- the budget ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["100MiB", 100 * MIB, {"cpu": "100MiB"}, {torch.device("cpu"): 100 * MIB}])
def test_on_the_cpu_a_mapping_is_the_number(value: Any) -> None:
    with a_step(value) as step:
        assert step.budget == 100 * MIB
        step.budget = {"cpu": "50MiB"}
        assert step.budget == 50 * MIB


def test_what_a_budget_says_on_a_device(device: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert Amounts.of("1GiB", device) == Amounts("1GiB", None)
    assert Amounts.of({"cuda": "6GiB", "cpu": "8GiB"}, device) == Amounts("6GiB", 8 << 30)
    assert Amounts.of({"cuda": 5, "cpu": 0}, device) == Amounts(5, 0)
    assert Amounts.of({device.name: "6GiB"}, device) == Amounts("6GiB", None)
    assert Amounts.of({"cpu": "1MiB"}, device) == Amounts("auto", MIB)
    assert Amounts.of({"cuda": "1GiB", "cpu": "auto"}, device) == Amounts("1GiB", None)
    with caplog.at_level(logging.INFO, "narrowboat"):
        found = Amounts("1GiB").host_bytes()
    assert found == pytest.approx(memory_limits().available / 2, rel=0.1)
    assert "budget for cpu" in caplog.text


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"cuda": "1GiB"}, r"has 'cuda', and the model is on the CPU: move it to the GPU"),
        ({"cuda:0": "1GiB", "cpu": "1GiB"}, r"has 'cuda:0', and the model is on the CPU"),
        ({"disk": "1GiB"}, r"has 'disk', which is no device of this step: there is 'cpu'"),
        ({}, r"names no device"),
        ({"cpu": "lots"}, r"'lots' is not a byte size"),
        ({"cpu": -1}, r"at least one byte"),
        ({"cpu": None}, r"is not a byte size"),
    ],
)
def test_budgets_that_cannot_be_on_the_cpu(budget: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        a_step(budget)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"cuda": "1MiB", "gpu": "1GiB"}, r"has 'gpu', which is no device of this step: there are 'cuda' and 'cpu'"),
        ({"cuda:7": "1MiB"}, r"has 'cuda:7', and the model is on cpu: give its budget as 'cuda'"),
        ({"cuda": "1MiB", "cpu": "many"}, r"budget for cpu 'many' is not a byte size"),
        ({"cuda": "1MiB", "cpu": -5}, r"budget for cpu -5 must be"),
        ({"cuda": "1MiB", "cpu": True}, r"budget for cpu True is not"),
    ],
)
def test_budgets_that_cannot_be_on_a_device(budget: Any, said: str, device: Any) -> None:
    with pytest.raises((UsageError, QuantityError), match=said):
        a_step(budget, device=device)


def test_a_budget_above_what_is_free_names_both(make_device: Any) -> None:
    device = make_device(64 * MIB)
    device.take(24 * MIB)
    with pytest.raises(DeviceMemoryError, match=r"budget of 48.0 MiB was asked for, and emulated has 40.0 MiB free"):
        a_step("48MiB", device=device)
    with a_step({"cuda": "32MiB", "cpu": "1MiB"}, device=device) as step:
        with pytest.raises(DeviceMemoryError, match="lower the budget for cuda"):
            step.budget = "1GiB"
        assert step.budget == 32 * MIB
        with pytest.raises(UsageError, match="leave 'cpu' out"):
            step.budget = {"cuda": "16MiB", "cpu": "2MiB"}
        step.budget = {"cuda": "16MiB"}
        assert step.budget == 16 * MIB


def test_auto_is_most_of_what_is_free_and_follows_it(make_device: Any, small_things_count: None) -> None:
    device = make_device(64 * MIB)
    with a_step({"cpu": "1MiB"}, device=device) as step:
        assert step.budget == pytest.approx(0.85 * 64 * MIB, rel=0.01)
        (batch,) = vectors(16)
        step(*batch)
        device.take(60 * MIB)
        step._budget._looked = 0.0
        step(*batch)
        assert step.budget == pytest.approx(4 * MIB, rel=0.1)
        assert "can be had on the device" in str(step.report().changes)
        device.take(-60 * MIB)
        for _ in range(25):
            step._budget._looked = 0.0
            step(*batch)
        assert step.budget > 50 * MIB


def test_pinning_that_is_refused_is_an_error_where_it_was_asked_for(
    make_device: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = make_device(pinnable=0)
    with pytest.raises(PinnedMemoryError, match="lower the budget for cpu"):
        a_step({"cuda": "100MiB", "cpu": "1GiB"}, device=device)
    with a_step("100MiB", device=device, spill=tmp_path) as step:
        (batch,) = vectors(16)
        step(*batch)
        assert any("activations in pinned host memory: " in reason for reason in step.plan.refused)
    assert "activations stay on the device" in caplog.text


def test_none_for_the_host_is_none(device: Any) -> None:
    with a_step({"cuda": "100MiB", "cpu": 0}, device=device) as step:
        assert "the budget for cpu is 0 B" in str(step.prepare(*vectors(16)[0]))
    assert device.pinned_bytes == 0


@pytest.mark.parametrize("folder", [False, True])
def test_where_host_and_device_share_memory_nothing_is_gained(make_device: Any, folder: bool, tmp_path: Path) -> None:
    device = make_device(unified=True)
    options = {"spill": tmp_path} if folder else {}
    with a_step({"cuda": "100MiB", "cpu": "1MiB"}, device=device, **options) as step:
        assert "computes in the host's memory" in str(step.prepare(*vectors(16)[0]))
        assert step._pool is None


# -- the batch -------------------------------------------------------------------------------------------------------


def test_a_batch_on_another_device_is_told() -> None:
    with FakeTensorMode():
        there = torch.empty(2, 4, device="cuda")
    here, labels = torch.empty(2, 4), torch.empty(2)
    with pytest.raises(
        UsageError, match=r"inputs are on cpu, and the model is on cuda:0: move them there \(inputs.to"
    ):
        check_batch(here, labels, on_cuda())
    with pytest.raises(UsageError, match=r"targets are on cpu, and the model is on cuda:0"):
        check_batch(there, labels, on_cuda())
    with pytest.raises(UsageError, match=r"inputs are on cuda:0, and the model is on cpu"):
        a_step("1GiB")(there, labels)
    with pytest.raises(UsageError, match=r"inputs are on cuda:0, and the model is on cpu"):
        a_step("1GiB").prepare(there, labels)
    check_batch({"x": there, "lengths": labels}, None, on_cuda())  # lengths of packed sequences are on the CPU
    check_batch(here, labels, mlp())
    check_batch(torch.empty(2, device="meta"), 3, mlp())


def test_weights_on_storage_are_for_the_cpu(device: Any) -> None:
    with pytest.raises(UsageError, match="weights on storage are trained on the CPU only"):
        a_step("100MiB", device=device, weights="somewhere.safetensors")
