"""Layers larger than the budget: their weights cut into tiles that stream like the weights of any layer.

A tiled layer stays the object it was, of its own class, in its place, with its parameters; only its ``forward``, on
the instance, goes over its tiles. A tile is a module beside the tree with one parameter, some rows of the layer's
weight, and entering and leaving it are events: so each tile has a step of its own, and no two need be in together.
The layer's own ``weight`` stays a stand-in that tells its shape, and refuses to be read as a whole.

A table (``nn.Embedding``, ``nn.EmbeddingBag``) is not cut: the rows asked for are read (``profile.rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.checkpoint import TensorEntry
from narrowboat.profile.rows import RowSource, bag_forward, embedding_forward
from narrowboat.profile.skeleton import TILES, Matched
from narrowboat.profile.slices import row_slices
from narrowboat.profile.use_trace import ENTER, UseTrace

SMALLEST = 1 << 20  # weights up to here are left whole: more reads and calls would cost more than they free
_SLICES = "_narrowboat_slices"
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class TiledLayer:
    """One layer whose weight is too large.

    Attributes:
        name: the layer.
        kind: its class.
        number: its module number.
        first: the module number of its first tile.
        whole: the number of the weight that is too large.
        tiles: the numbers of the weights that stand for it, in order; none for a table.
        slices: the rows ``(start, stop)`` of each tile.
    """

    name: str
    kind: type[nn.Module]
    number: int
    first: int
    whole: int
    tiles: tuple[int, ...] = ()
    slices: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Tiling:
    """Which layers are tiled, and into what; nothing has been done to the module yet.

    Attributes:
        limit: bytes above which a weight is tiled, and that a tile should not exceed.
        layers: the tiled layers, in order of module numbers.
        weights: all weights: those of before under their numbers, then the tiles.
    """

    limit: int
    layers: tuple[TiledLayer, ...]
    weights: tuple[Weight, ...]

    @property
    def largest(self) -> int:
        """Bytes of the largest tile; 0 where there are tables only."""
        return max((self.weights[t].entry.nbytes for layer in self.layers for t in layer.tiles), default=0)

    def owned(self, before: dict[int, list[int]]) -> dict[int, list[int]]:
        """The weights registered on each module, by number: a tile owns its own, and nobody a whole."""
        by_number = {layer.number: layer for layer in self.layers}
        after: dict[int, list[int]] = {}
        for number, weights in before.items():
            rest = [w for w in weights if not self.weights[w].tiled]
            if rest:
                after[number] = rest
            if number in by_number:
                layer = by_number[number]
                after.update({layer.first + i: [tile] for i, tile in enumerate(layer.tiles)})
        return after


def is_convolution(kind: type[nn.Module]) -> bool:
    """Whether a layer's class is one of the convolutions that can be tiled."""
    return kind in _CONVOLUTIONS


class Tile(nn.Module):
    """Some rows of a layer's weight."""

    def __init__(self, entry: TensorEntry, requires_grad: bool) -> None:
        super().__init__()
        empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        self.weight = nn.Parameter(empty, requires_grad=requires_grad)

    def forward(self, compute: Callable[..., torch.Tensor], *args: Any) -> torch.Tensor:
        """``compute(rows, *args)``, in a step of its own."""
        return compute(self.weight, *args)


Owner = tuple[int, str, nn.Module]  # module number, name, module


def tileable(module: nn.Module, matched: Matched, trace: UseTrace | None) -> dict[int, list[Owner]]:
    """The weights that could be tiled, by number, with the layers that hold them (several if tied).

    A weight qualifies if only layers that can be tiled hold it and, as far as the trace knows, only their own
    ``forward`` touches it. What attention and encoder layers of PyTorch have inside goes to fused operators.
    """
    fused: set[int] = set()
    owners: dict[int, list[tuple[int, str, nn.Module, str]]] = {}
    for number, (name, child) in enumerate(module.named_modules()):
        if isinstance(child, (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            fused.update(id(inner) for inner in child.modules())
        for key, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None and id(tensor) in matched.numbers:
                owners.setdefault(matched.numbers[id(tensor)], []).append((number, name, child, key))
    found = {
        w: [(number, name, child) for number, name, child, _ in held]
        for w, held in owners.items()
        if all(key == "weight" and id(child) not in fused for _, _, child, key in held)
        and all(_can_tile(child, matched.weights[w].entry) for _, _, child, _ in held)
    }
    if trace is None:
        return found
    for (number, kind), used in zip(trace.events, trace.uses, strict=True):
        for w in used:
            if w in found and (kind != ENTER or number not in {owner[0] for owner in found[w]}):
                del found[w]
    for w in {*trace.written, *(hold[0] for hold in trace.holds)}:
        found.pop(w, None)
    return found


def _can_tile(child: nn.Module, entry: TensorEntry) -> bool:
    if "forward" in child.__dict__ or not entry.nbytes:
        return False
    if type(child) in _TABLES:
        size = entry.dtype.itemsize
        # A limit on norms is kept by writing to the table.
        return child.max_norm is None and size <= 8 and entry.offset % size == 0
    return type(child) is nn.Linear or type(child) in _CONVOLUTIONS


def plan_tiles(module: nn.Module, matched: Matched, candidates: dict[int, list[Owner]], limit: int) -> Tiling | None:
    """Cut every candidate of more than ``limit`` bytes; None if there is none.

    Args:
        module: the skeleton.
        matched: its weights.
        candidates: what ``tileable`` found.
        limit: bytes.
    """
    weights = list(matched.weights)
    layers: list[TiledLayer] = []
    number = sum(1 for _ in module.named_modules())
    for w, owners in candidates.items():
        whole = matched.weights[w]
        entry = whole.entry
        if entry.nbytes <= limit:
            continue
        cut = [owner for owner in owners if type(owner[2]) not in _TABLES]
        slices: tuple[tuple[int, int], ...] = ()
        tiles: tuple[int, ...] = ()
        if cut:
            groups = lcm(*(_rows_of_a_group(child) for _, _, child in cut))
            slices = row_slices(entry.shape[0], entry.nbytes // entry.shape[0], limit, multiple=groups)
            if len(slices) == 1:
                continue
            tiles = tuple(range(len(weights), len(weights) + len(slices)))
            weights += [Weight(t, *_piece(whole, s)) for t, s in zip(tiles, slices, strict=True)]
        weights[w] = Weight(w, whole.name, entry, f"in {len(tiles)} tiles" if tiles else "on the rows asked for")
        for at, name, child in owners:
            own = () if type(child) in _TABLES else tiles
            layers.append(TiledLayer(name, type(child), at, 0, w, own, slices if own else ()))
    numbered = []
    for layer in sorted(layers, key=lambda layer: layer.number):
        numbered.append(replace(layer, first=number))
        number += len(layer.tiles)
    return Tiling(limit, tuple(numbered), tuple(weights)) if numbered else None


def _rows_of_a_group(child: nn.Module) -> int:
    """Output rows that only go together: those of one group of a grouped convolution."""
    layer: Any = child
    return layer.out_channels // layer.groups if type(child) in _CONVOLUTIONS and layer.groups > 1 else 1


def _piece(whole: Weight, rows: tuple[int, int]) -> tuple[str, TensorEntry]:
    entry, (start, stop) = whole.entry, rows
    row = entry.nbytes // entry.shape[0]
    shape = (stop - start, *entry.shape[1:])
    name, offset, nbytes = f"{entry.name}[{start}:{stop}]", entry.offset + start * row, (stop - start) * row
    return whole.name, replace(entry, name=name, shape=shape, nbytes=nbytes, offset=offset)


def install(module: nn.Module, tiling: Tiling, numbers: dict[int, int], rows: RowSource) -> None:
    """Give the layers their tiles, on meta, and a ``forward`` that goes over them.

    Args:
        module: the skeleton.
        tiling: what ``plan_tiles`` decided for it.
        numbers: ``id(tensor) -> weight number``; the tiles' parameters are added.
        rows: reads the rows of tables.
    """
    modules = [child for _, child in module.named_modules()]
    for layer in tiling.layers:
        child = modules[layer.number]
        forward: Callable[..., torch.Tensor]
        if layer.kind in _TABLES:
            child.__dict__["_narrowboat_rows"] = (rows, tiling.weights[layer.whole])
            forward = embedding_forward if layer.kind is nn.Embedding else bag_forward
        else:
            flag = child.weight.requires_grad
            tiles = [Tile(tiling.weights[t].entry, flag) for t in layer.tiles]
            numbers.update({id(tile.weight): t for tile, t in zip(tiles, layer.tiles, strict=True)})
            child.__dict__[TILES], child.__dict__[_SLICES] = tiles, layer.slices
            forward = _linear_forward if layer.kind is nn.Linear else _convolution_forward
        child.__dict__["forward"] = MethodType(forward, child)


def uninstall(module: nn.Module, tiling: Tiling) -> None:
    """Undo ``install``; wrappers put on since have to be off again."""
    modules = [child for _, child in module.named_modules()]
    for layer in tiling.layers:
        for key in (TILES, _SLICES, "_narrowboat_rows", "forward"):
            modules[layer.number].__dict__.pop(key, None)


def _linear_forward(self: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    def some(weight: torch.Tensor, start: int, stop: int, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(input, weight, bias)

    return _over_tiles(self, some, self.out_features, -1)


def _convolution_forward(self: Any, input: torch.Tensor) -> torch.Tensor:
    convolve = _CONVOLUTIONS[type(self)]
    spatial = len(self.kernel_size)
    padding = self.padding
    if self.padding_mode != "zeros":
        input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = (0,) * spatial
    into, out_of = self.in_channels // self.groups, self.out_channels // self.groups  # channels of one group

    def some(weight: torch.Tensor, start: int, stop: int, bias: torch.Tensor | None) -> torch.Tensor:
        part, groups = input, self.groups
        if groups > 1:
            first, last = start // out_of, stop // out_of
            part, groups = input.narrow(-spatial - 1, first * into, (last - first) * into), last - first
        return convolve(part, weight, bias, self.stride, padding, self.dilation, groups)

    return _over_tiles(self, some, self.out_channels, -spatial - 1)


def _over_tiles(self: Any, some: Callable[..., torch.Tensor], size: int, dim: int) -> torch.Tensor:
    """Compute tile after tile into its place of the output, of ``size`` along ``dim``.

    One tile's result at a time exists beside the output: ``torch.cat`` would hold everything twice.
    """
    # A copy, so that the bias itself is in use for this step only, and not through all the tiles.
    bias = None if self.bias is None else self.bias.clone()
    tiles: Sequence[Tile] = self.__dict__[TILES]
    out: torch.Tensor | None = None
    for tile, (start, stop) in zip(tiles, self.__dict__[_SLICES], strict=True):
        part = tile(some, start, stop, None if bias is None else bias[start:stop])
        if out is None:
            out = _empty_like_part(part, size, dim)
        out.narrow(dim, start, stop - start).copy_(part)
        del part
    assert out is not None
    return out


def _empty_like_part(part: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    shape = list(part.shape)
    shape[dim] = size
    form = torch.contiguous_format
    if not part.is_contiguous():
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(part.dim())
        if last is not None and part.is_contiguous(memory_format=last):
            form = last
    return torch.empty(shape, dtype=part.dtype, memory_format=form)
