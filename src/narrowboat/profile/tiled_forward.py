"""What a tiled layer runs: its tiles one after the other, each into its place of the output.

One tile's result at a time exists beside the output; ``torch.cat`` would hold everything twice. A convolution whose
workspace, and not its weight, is too large goes over strips of output rows besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from narrowboat.checkpoint import TensorEntry
from narrowboat.profile.skeleton import TILES

CUT = "_narrowboat_cut"
CONVOLUTIONS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
Fill = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Cut:
    """How a layer is cut: the rows of its weight ``(start, stop)`` tile by tile, and strips of its output."""

    slices: tuple[tuple[int, int], ...]
    strips: int = 1


class Tile(nn.Module):
    """Some rows of a layer's weight."""

    def __init__(self, entry: TensorEntry, requires_grad: bool) -> None:
        super().__init__()
        empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=requires_grad)

    def forward(self, fill: Fill, *args: Any) -> torch.Tensor:
        """``fill(rows, *args)``, in a step of its own."""
        return fill(self.weight, *args)


def linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """``nn.Linear.forward`` over tiles."""
    return _over_tiles(self, partial(linear_rows, input, self.out_features))


def linear_rows(
    input: torch.Tensor,
    rows: int,
    weight: torch.Tensor,
    start: int,
    stop: int,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """The part of a linear layer's output that one tile makes, in its place.

    Args:
        input: shape ``(*, in_features)``.
        rows: output features of the whole layer.
        weight: rows ``start`` to ``stop`` of the layer's weight, and ``bias`` the same of its bias.
        out: shape ``(*, rows)``, from the tile before; None for the first.
    """
    part = F.linear(input, weight, bias)
    if stop - start == rows:
        return part
    if out is None:
        out = part.new_empty((*part.shape[:-1], rows))
    out.narrow(-1, start, stop - start).copy_(part)
    return out


def convolution_forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    """``forward`` of a convolution over tiles, and over strips of the first spatial dimension."""
    convolve = CONVOLUTIONS[type(self)]
    spatial = len(self.kernel_size)
    channels, rows = -spatial - 1, -spatial
    padding = self.padding
    if self.padding_mode != "zeros":
        input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = (0,) * spatial
    into, out_of = self.in_channels // self.groups, self.out_channels // self.groups  # channels of one group
    strips = _strips(self, input.shape[rows], self.__dict__[CUT].strips)

    def fill(
        weight: torch.Tensor, start: int, stop: int, bias: torch.Tensor | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        source, groups = input, self.groups
        if groups > 1 and stop - start < self.out_channels:
            first, last = start // out_of, stop // out_of
            source, groups = input.narrow(channels, first * into, (last - first) * into), last - first
        for low, high, above, below, first_row, last_row in strips:
            part, pad = source, padding
            if len(strips) > 1:
                part, pad = source.narrow(rows, low, high - low), (0, *padding[1:])
                if above or below:
                    part = F.pad(part, (*(0, 0) * (spatial - 1), above, below))
            made = convolve(part, weight, bias, self.stride, pad, self.dilation, groups)
            del part
            if out is None:
                size = {channels: self.out_channels}
                if len(strips) > 1:
                    size[rows] = strips[-1][-1]
                out = _empty(made, size)
            place = out.narrow(channels, start, stop - start)
            place = place.narrow(rows, first_row, last_row - first_row) if len(strips) > 1 else place
            place.copy_(made)
            del made
        assert out is not None
        return out

    return _over_tiles(self, fill)


Strip = tuple[int, int, int, int, int, int]  # input rows from and to, zeros above and below, output rows from and to


def _strips(layer: Any, rows: int, count: int) -> list[Strip]:
    """The strips of a convolution over ``rows`` input rows; one that says nothing if it is not cut."""
    if count <= 1 or isinstance(layer.padding, str):
        return [(0, rows, 0, 0, 0, 0)]
    stride, padding = layer.stride[0], layer.padding[0] if layer.padding_mode == "zeros" else 0
    reach = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
    total = (rows + 2 * padding - reach) // stride + 1
    count = min(count, total)
    if count <= 1:
        return [(0, rows, 0, 0, 0, 0)]
    strips = []
    for i in range(count):
        first, last = total * i // count, total * (i + 1) // count
        low, high = first * stride - padding, (last - 1) * stride - padding + reach
        above, below = max(-low, 0), max(high - rows, 0)
        strips.append((low + above, max(high - below, low + above), above, below, first, last))
    return strips


def _over_tiles(self: Any, fill: Fill) -> torch.Tensor:
    # A copy, so that the bias itself is in use for this step only, and not through all the tiles.
    bias = None if self.bias is None else self.bias.clone()
    tiles = self.__dict__.get(TILES)
    cut: Cut = self.__dict__[CUT]
    if not tiles:
        return fill(self.weight, 0, self.weight.shape[0], bias, None)
    out: torch.Tensor | None = None
    for tile, (start, stop) in zip(tiles, cut.slices, strict=True):
        out = tile(fill, start, stop, None if bias is None else bias[start:stop], out)
    assert out is not None
    return out


def _empty(part: torch.Tensor, size: dict[int, int]) -> torch.Tensor:
    """Memory for the whole output, laid out as a part of it is."""
    shape = list(part.shape)
    for dim, length in size.items():
        shape[dim] = length
    form = torch.contiguous_format
    if not part.is_contiguous():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(part.dim())
        if last is not None and part.is_contiguous(memory_format=last):
            form = last
    return torch.empty(shape, dtype=part.dtype, memory_format=form)
