"""What a convolution takes besides its input, weight and output, by the kernel that PyTorch picks for it.

The sizes were measured on PyTorch 2.13 (docs/memory.md), and follow from what the kernels do:

- oneDNN computes in a blocked layout of its own: it copies input and weight into it, and the result out of it. The
  output is not touched before the copy of the input has gone, so the larger of the two counts, and the weight.
- The others unfold the input into a matrix of columns, ``channels x kernel`` numbers for each output position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

_BLOCK = 16  # channels; the widest of oneDNN's blocks


@dataclass(frozen=True)
class Workspace:
    """The scratch memory of one convolution.

    Attributes:
        columns: bytes of the unfolded input; 0 where oneDNN computes.
        nbytes: bytes in all.
        kept: bytes on top of that where freed memory stays in the heap: oneDNN's copy of the input, which has gone
            before the output is touched.
    """

    columns: int
    nbytes: int
    kept: int = 0


def workspace(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *,
    output: torch.Tensor,
) -> Workspace:
    """The scratch memory of ``aten.convolution`` with these arguments.

    Args:
        input: ``[batch, channels, *space]``; it and the others may be fake.
        output: what it returns.
    """
    backend = _backend(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    if not backend.startswith("Slow"):
        if _is_channels_last(input):
            return Workspace(0, _bytes(weight))
        sizes = _padded(input), _bytes(weight), _padded(output)
        return Workspace(0, blocked(*sizes) + transposed * _bytes(output), min(sizes[0], sizes[2]))
    positions = prod(input.shape[2:]) if transposed else prod(output.shape[2:])
    channels = (output if transposed else input).shape[1]
    columns = channels // groups * prod(weight.shape[2:]) * positions * input.element_size()
    if transposed:
        return Workspace(columns, 3 * columns + _bytes(output))
    if "Dilated" not in backend:
        columns *= input.shape[0]
    plain = (prod(weight.shape[2:]), max(stride), max(padding)) == (1, 1, 0)
    columns = 0 if plain else columns
    apart = _bytes(input) // groups + _bytes(output) if groups > 1 else 0  # group by group, then put together
    return Workspace(columns, columns + apart)


def blocked(input: int, weight: int, output: int) -> int:
    """Bytes of oneDNN's copies, from those of its operands."""
    return max(input, output) + weight


def _backend(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *settings: Any) -> str:
    """The name of the kernel that PyTorch would take; "" where it does not say (oneDNN's is by far the likeliest)."""
    try:
        chosen = torch._C._select_conv_backend(input, weight, bias, *settings)  # type: ignore[attr-defined, unused-ignore]
    except (AttributeError, RuntimeError, TypeError):
        return ""
    return getattr(chosen, "name", "")


def _is_channels_last(input: torch.Tensor) -> bool:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    return last is not None and not input.is_contiguous() and input.is_contiguous(memory_format=last)


def _padded(tensor: torch.Tensor) -> int:
    channels = tensor.shape[1]
    return _bytes(tensor) // max(channels, 1) * (-(-channels // _BLOCK) * _BLOCK)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
