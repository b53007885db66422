"""BatchNorm run again from the statistics that its first run left.

In training BatchNorm reads its input for the mean, for the variance, and once more to scale and shift it. Autograd
keeps mean and inverse deviation, a few KiB, for the backward pass anyway; with them a replay is the last of the three
passes, and on a CPU an eighth of the whole (docs/training.md). PyTorch has no operator that takes them, but BatchNorm
in evaluation, with mean 0, variance 1 and eps 0, computes ``x * weight + bias`` with the same kernel, so it is given
the products: ``weight * inverse`` and ``bias - mean * weight * inverse``.

Where that gives the same bits is tried out once for each pair of types.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from narrowboat.train.tape.encoded import EncodedOp
from narrowboat.train.tape.facts import OpFacts
from narrowboat.train.tape.leaves import plain

_MEAN, _INVERSE = 1, 2  # places among the operator's results
_TRAINING = 5  # place among its arguments
_SHAPES = ((4, 67, 9, 9), (3, 40, 28, 28), (8, 130, 1, 1), (16, 33))  # with and without rests of vectors


def lasting_results(facts: OpFacts, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Places among an operator's results that have to last for a replay that costs less; () where there is none.

    Args:
        facts: of the operator.
        args: as it is called; fake tensors will do.
    """
    if facts.name != "aten::native_batch_norm" or len(args) <= _TRAINING or args[_TRAINING] is not True:
        return ()
    x, weight, bias = args[:3]
    if not all(plain(each) and each.device.type == "cpu" for each in (x, weight, bias) if each is not None):
        return ()
    if not x.numel() or not _in_order(x):
        return ()
    types = (None if each is None else each.dtype for each in (weight, bias))
    return (_MEAN, _INVERSE) if _same_bits(x.dtype, *types) else ()


def shorten(encoded: EncodedOp, facts: OpFacts, args: tuple[Any, ...], results: tuple[torch.Tensor, ...]) -> None:
    """Have an operator that was just called run again by ``renormalised``, where that can be.

    Args:
        encoded: the call.
        facts, args: of it.
        results: what it gave.
    """
    if lasting_results(facts, args):
        encoded.func, encoded.kwargs = renormalised, {}
        encoded.args = (*encoded.args[:3], results[_MEAN].detach(), results[_INVERSE].detach())


def renormalised(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    inverse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``aten::native_batch_norm`` gives in training.

    Args:
        x: [batch, channels, ...].
        weight, bias: [channels], or None.
        mean, inverse: [channels], as the operator gave them for ``x``.
    """
    scale = inverse if weight is None else inverse * weight
    # The kernel rounds once in product and difference; so does addcmul.
    shift = torch.addcmul(torch.zeros_like(mean) if bias is None else bias, mean, scale, value=-1)
    nothing, one = torch.zeros_like(mean), torch.ones_like(mean)
    out = torch.ops.aten.native_batch_norm.default(x, scale, shift, nothing, one, False, 0.0, 0.0)[0]
    return out, mean, inverse


def _in_order(x: torch.Tensor) -> bool:
    # Other layouts have a kernel that rounds otherwise.
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


@cache
def _same_bits(x_type: torch.dtype, weight_type: torch.dtype | None, bias_type: torch.dtype | None) -> bool:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    def channels(dtype: torch.dtype | None, count: int) -> torch.Tensor | None:
        return None if dtype is None else drawn(count).to(dtype)

    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        for shape in _SHAPES:
            x = 3 * drawn(*shape) + 5 * drawn(shape[1]).view(-1, *[1] * (len(shape) - 2))
            formats = (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]
            weight, bias = channels(weight_type, shape[1]), channels(bias_type, shape[1])
            for layout in formats:
                given = x.to(x_type).contiguous(memory_format=layout)
                try:
                    first = torch.ops.aten.native_batch_norm.default(given, weight, bias, None, None, True, 0.1, 1e-5)
                    again = renormalised(given, weight, bias, *first[1:])[0]
                except RuntimeError:  # types that do not go together
                    return False
                if again.stride() != first[0].stride() or not torch.equal(again, first[0]):
                    return False
    return True
