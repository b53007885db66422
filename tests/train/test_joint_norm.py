"""Moments of pieces, joined, are the moments of the whole; each function's gradient is the numerical one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from narrowboat.train.joint_norm import joined, moments, normalised


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any), offset=st.sampled_from([0.0, 1e6]))
def test_joined_moments_are_those_of_the_whole_batch(sizes: list[int], offset: float) -> None:
    x = torch.randn(sum(sizes), 3, 2, dtype=torch.double) + offset
    joint = joined([moments(piece) for piece in x.split(sizes)])
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    assert joint.count == x.shape[0] * 2
    torch.testing.assert_close(joint.mean, mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(joint.var, var, rtol=1e-9, atol=1e-12)


def test_gradients_are_the_numerical_ones() -> None:
    x = torch.randn(4, 3, 2, dtype=torch.double, requires_grad=True)
    mean, weight, bias = (torch.randn(3, dtype=torch.double, requires_grad=True) for _ in range(3))
    var = torch.rand(3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (moments(x).mean, moments(x).var), (x,))
    assert torch.autograd.gradcheck(lambda *a: normalised(*a, 1e-5), (x, mean, var, weight, bias))
    assert torch.autograd.gradcheck(lambda x, m, v: normalised(x, m, v, None, None, 1e-5), (x, mean, var))
    assert torch.autograd.gradcheck(lambda x, m, v, w: normalised(x, m, v, w, None, 1e-5), (x, mean, var, weight))


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_half_precision_is_normalised_with_single_precision_statistics(parameters: torch.dtype) -> None:
    x = (torch.randn(64, 3, 8, 8) + 3).bfloat16().requires_grad_()
    weight, bias = (torch.randn(3).to(parameters).requires_grad_() for _ in range(2))
    joint = joined([moments(piece) for piece in x.split([10, 54])])
    y = normalised(x, joint.mean, joint.var, weight, bias, 1e-5)
    y.square().sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and weight.grad.dtype == parameters
    whole = F.batch_norm(x.detach().double(), None, None, weight.double(), bias.double(), training=True)
    torch.testing.assert_close(y.double(), whole, rtol=1e-2, atol=1e-2)
