"""Bytes of optimizer state are told before there are any, for optimizers nobody named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim

from narrowboat.train.state import gradient_bytes, state_bytes
from narrowboat.train.state.bucketed import partition
from narrowboat.train.state.predict import nbytes_of


class Flat(optim.SGD):
    """Keeps its momentum flat, and asks for numbers, so that only a small copy with values can tell."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].setdefault("flat", torch.zeros(parameter.numel(), dtype=torch.float64))
                    self.state[parameter]["norm"] = parameter.grad.norm().item()


class EightBit(optim.SGD):
    """Keeps large parameters' momentum in bytes and small ones' in full, as quantised optimizers do."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    dtype = torch.uint8 if parameter.numel() >= 1000 else torch.float32
                    self.state[parameter]["m"] = torch.zeros_like(parameter, dtype=dtype)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (optim.AdamW, {}),
        (optim.Adam, {"amsgrad": True, "fused": True}),
        (optim.SGD, {"lr": 0.1}),
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
        (optim.Adagrad, {}),
        (optim.Adafactor, {}),
        (optim.RMSprop, {"centered": True}),
        (Flat, {"lr": 0.1}),
        (EightBit, {"lr": 0.1}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_prediction_is_what_the_first_step_makes(kind: Any, settings: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = [(5,), (), (40, 30), (2, 3, 4, 5), (1, 64)]
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
    optimizer = kind([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.3}], **settings)
    random = torch.get_rng_state()
    told = state_bytes(optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    made = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert told == nbytes_of(made) == state_bytes(optimizer)


def test_frozen_parameters_need_neither_state_nor_gradients() -> None:
    net = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    net[0].requires_grad_(False)
    assert gradient_bytes(net.parameters()) == 110 * 4
    assert state_bytes(optim.AdamW(net.parameters())) == 2 * 110 * 4 + 2 * 4


def test_a_model_without_memory_is_enough_to_tell() -> None:
    with torch.device("meta"):
        net = nn.Linear(50_000, 50_000)
    assert state_bytes(optim.AdamW(net.parameters())) == 2 * gradient_bytes(net.parameters()) + 2 * 4


@given(st.lists(st.integers(0, 50)), st.integers(1, 60))
def test_buckets_keep_the_order_and_the_limit(weights: list[int], limit: int) -> None:
    parameters = [torch.empty(0) for _ in weights]
    buckets = partition(parameters, weights, limit)
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]
    weight = {id(p): w for p, w in zip(parameters, weights, strict=True)}
    totals = [sum(weight[id(p)] for p in bucket) for bucket in buckets]
    assert all(total <= limit or len(bucket) == 1 for total, bucket in zip(totals, buckets, strict=True))
    # None could have been put together with the next.
    for total, bucket in zip(totals, buckets[1:], strict=False):
        assert total + weight[id(bucket[0])] > limit
