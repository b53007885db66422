"""BatchNorm over micro-batches that are not in one tensor: local moments, joined moments, normalisation.

One BatchNorm of a batch that is held in K pieces is three functions, each differentiable by itself:

- :func:`moments`: mean and variance of one piece, per channel;
- :func:`joined`: mean and variance of all pieces from those of each (Chan, Golub and LeVeque 1979, the parallel
  form of the two-pass variance), in float64;
- :func:`normalised`: one piece, normalised with the mean and the variance of all.

Only the middle one knows about the others, and it works on vectors of one number per channel. So a piece is read,
saved for the backward pass and let go where it lives, and backward never needs two pieces at once: the gradient
that reaches a piece through the statistics is a straight line in the piece itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten  # mypy does not see operators that are registered at run time


@dataclass(frozen=True)
class Moments:
    """Statistics of a piece of a batch, ``mean`` and biased ``var``, shape ``(channels,)``, of ``count`` values."""

    count: int
    mean: Tensor
    var: Tensor


def moments(x: Tensor) -> Moments:
    """Mean and biased variance per channel of ``x``, shape ``(n, channels, ...)``; differentiable.

    Two passes of the kernel that BatchNorm itself uses. Statistics of half precision are float32.
    """
    mean, var = _LocalMoments.apply(x)
    return Moments(count=x.numel() // x.shape[1], mean=mean, var=var)


def joined(pieces: Sequence[Moments]) -> Moments:
    """The moments of all ``pieces`` together, in float64; differentiable. Pieces without values count for nothing."""
    pieces = [piece for piece in pieces if piece.count] or pieces
    total = sum(piece.count for piece in pieces)
    means = torch.stack([piece.mean.double() for piece in pieces])
    variances = torch.stack([piece.var.double() for piece in pieces])
    share = torch.stack([means.new_full((1,), piece.count / max(total, 1)) for piece in pieces])
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return Moments(total, mean, var)


def normalised(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` per channel, in ``x``'s dtype; differentiable."""
    exact = _statistics_dtype(x)
    parameters = (None if p is None else p.to(exact) for p in (weight, bias))
    return _Normalise.apply(x, mean.to(exact), var.to(exact), *parameters, eps)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *([1] * (x.dim() - 2)))


class _LocalMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel takes its accumulators' type from the running statistics: these two are only for that.
        unused = x.new_zeros(x.shape[1], dtype=_statistics_dtype(x))
        mean, var = unused, unused.clone()
        if x.numel():
            mean, var = _aten.batch_norm_update_stats(x, mean, var, 0.0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        count = max(x.numel() // x.shape[1], 1)
        grad = x - _per_channel(mean, x)  # centred before it is scaled: a large mean would cancel badly after
        grad.mul_(_per_channel(grad_var * (2 / count), x)).add_(_per_channel(grad_mean / count, x))
        return grad.to(x.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps = eps
        # With training=False the kernel normalises with the statistics it is given.
        return _aten.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all six arguments from that of the output, [batch, channels, ...]; None for ``eps``."""
        x, mean, var, weight = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], True, True]
        arguments = (grad, x, weight, mean, var, None, None, False, ctx.eps, wanted)
        grad_x, grad_weight, grad_bias = _aten.native_batch_norm_backward(*arguments)
        inverse = torch.rsqrt(var + ctx.eps)
        scale = inverse if weight is None else inverse * weight
        # The sums over the piece that weight and bias need are the ones that the statistics need.
        grad_mean, grad_var = -scale * grad_bias, -0.5 * scale * inverse * grad_weight
        has_bias = ctx.needs_input_grad[4]
        return (
            grad_x,
            grad_mean,
            grad_var,
            None if weight is None else grad_weight,
            grad_bias if has_bias else None,
            None,
        )
