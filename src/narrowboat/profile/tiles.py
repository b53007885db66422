"""Layers larger than the budget: their weights cut into tiles that stream like the weights of any layer.

A tiled layer stays the object it was, of its own class, in its place, with its parameters; only its ``forward``, on
the instance, goes over its tiles. A tile is a module beside the tree with one parameter, some rows of the layer's
weight, and entering and leaving it are events: so each tile has a step of its own, and no two need be in together.
The layer's own ``weight`` stays a stand-in that tells its shape, and refuses to be read as a whole.

The weights of ``nn.MultiheadAttention``, and all inside ``nn.TransformerEncoderLayer``, go to fused operators: where
one of them is cut, the layer goes step by step (``profile.attention``).

A table (``nn.Embedding``, ``nn.EmbeddingBag``) is not cut: the rows asked for are read (``profile.rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import lcm
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from narrowboat.arena.slot import Weight
from narrowboat.checkpoint import TensorEntry
from narrowboat.profile.attention import IN_WEIGHTS, PROJECTIONS, can_unfuse, fuses, unfuse
from narrowboat.profile.rows import RowSource, bag_forward, embedding_forward
from narrowboat.profile.skeleton import TILES, Matched
from narrowboat.profile.slices import row_slices
from narrowboat.profile.tiled_forward import CONVOLUTIONS, CUT, Cut, Tile, convolution_forward, linear_forward
from narrowboat.profile.use_trace import ENTER, UseTrace
from narrowboat.quantities import format_bytes

SMALLEST = 1 << 20  # weights up to here are left whole: more reads and calls would cost more than they free
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)  # the second: an attention's output projection


@dataclass(frozen=True)
class TiledLayer:
    """One layer whose weight, or whose workspace, is too large.

    Attributes:
        name: the layer.
        kind: its class.
        number: its module number.
        first: the module number of its first tile.
        whole: the number of its weight.
        tiles: the numbers of the weights that stand for it, in order; none for a table, or if it is left whole.
        slices: the rows ``(start, stop)`` of each tile.
        strips: pieces in which a convolution makes the rows of its output.
        key: the weight's name in its module.
        user: the number of the module in whose ``forward`` it is used: for an attention's output projection, the
            attention's.
    """

    name: str
    kind: type[nn.Module]
    number: int
    first: int
    whole: int
    tiles: tuple[int, ...] = ()
    slices: tuple[tuple[int, int], ...] = ()
    strips: int = 1
    key: str = "weight"
    user: int = -1

    @property
    def table(self) -> bool:
        """Whether rows of it are read on demand."""
        return self.kind in _TABLES


@dataclass(frozen=True)
class Tiling:
    """Which layers are tiled, and into what; nothing has been done to the module yet.

    Attributes:
        limit: bytes above which a weight is tiled, and that a tile should not exceed.
        layers: the tiled layers, in order of module numbers.
        weights: all weights: those of before under their numbers, then the tiles.
        unfused: the attention and encoder layers that go step by step, by module number.
        projecting: the weights that attentions make their queries, keys and values with.
        attending: those that they use afterwards.
    """

    limit: int
    layers: tuple[TiledLayer, ...]
    weights: tuple[Weight, ...]
    unfused: tuple[int, ...] = ()
    projecting: frozenset[int] = frozenset()
    attending: frozenset[int] = frozenset()

    @property
    def largest(self) -> int:
        """Bytes of the largest tile; 0 where there are tables only."""
        return max((self.weights[t].entry.nbytes for layer in self.layers for t in layer.tiles), default=0)

    def owned(self, before: dict[int, list[int]]) -> dict[int, list[int]]:
        """The weights registered on each module, by number: a tile owns its own, and nobody a whole."""
        after: dict[int, list[int]] = {}
        for number, weights in before.items():
            rest = [w for w in weights if not self.weights[w].tiled]
            apart = {layer.number for layer in self.layers if layer.user == number != layer.number}
            rest = [w for w in rest if not any(w in before.get(n, ()) for n in apart)]
            if number in self.unfused and not any(layer.user == number for layer in self.layers):
                rest = []  # an encoder layer: the modules inside it see to theirs
            if rest:
                after[number] = rest
            for layer in self.layers:
                if layer.number == number:
                    after.update({layer.first + i: [tile] for i, tile in enumerate(layer.tiles)})
        return after


class Owner(NamedTuple):
    """Who holds a weight.

    Attributes:
        number, name, module: the module it is registered on.
        key: its name there.
        user: the number of the module in whose ``forward`` it is used.
    """

    number: int
    name: str
    module: nn.Module
    key: str
    user: int


def tileable(
    module: nn.Module, matched: Matched, trace: UseTrace | None, unfused: UseTrace | None = None
) -> dict[int, list[Owner]]:
    """The weights that could be tiled, by number, with the layers that hold them (several if tied).

    A weight qualifies if only layers that can be tiled hold it and, as far as the trace knows, only their own
    ``forward`` touches it.

    Args:
        module: the skeleton.
        matched: its weights.
        trace: one pass; None if there is none.
        unfused: the same without PyTorch's fused attention; where there is a trace and not this one, the weights of
            such layers are left whole.
    """
    whole: set[int] = set()
    user: dict[int, int] = {}
    owners: dict[int, list[Owner]] = {}
    for number, (name, child) in enumerate(module.named_modules()):
        if fuses(child) and (not can_unfuse(child) or (trace is not None and unfused is None)):
            whole.update(id(inner) for inner in child.modules())
        elif type(child) is nn.MultiheadAttention:
            user[id(child.out_proj)] = number
        for key, tensor in (*child._parameters.items(), *child._buffers.items()):
            if tensor is not None and id(tensor) in matched.numbers:
                owner = Owner(number, name, child, key, user.get(id(child), number))
                owners.setdefault(matched.numbers[id(tensor)], []).append(owner)
    found = {
        w: held
        for w, held in owners.items()
        if all(id(owner.module) not in whole and _can_tile(owner, matched.weights[w].entry) for owner in held)
    }
    trace = unfused or trace
    if trace is None:
        return found
    for (number, kind), used in zip(trace.events, trace.uses, strict=True):
        for w in used:
            if w in found and (kind != ENTER or number not in {owner.user for owner in found[w]}):
                del found[w]
    for w in {*trace.written, *(hold[0] for hold in trace.holds)}:
        found.pop(w, None)
    return found


def _can_tile(owner: Owner, entry: TensorEntry) -> bool:
    child: Any = owner.module
    if "forward" in child.__dict__ or not entry.nbytes or entry.pieces:
        return False
    if type(child) is nn.MultiheadAttention:
        return owner.key in IN_WEIGHTS
    if owner.key != "weight":
        return False
    if type(child) in _TABLES:
        size = entry.dtype.itemsize
        # A limit on norms is kept by writing to the table.
        return child.max_norm is None and size <= 8 and entry.offset % size == 0
    return type(child) in (*_LINEAR, *CONVOLUTIONS)


def plan_tiles(
    module: nn.Module,
    matched: Matched,
    candidates: dict[int, list[Owner]],
    limit: int,
    strips: Mapping[int, int] | None = None,
) -> Tiling | None:
    """Cut every candidate of more than ``limit`` bytes; None if there is nothing to cut.

    Args:
        module: the skeleton.
        matched: its weights.
        candidates: what ``tileable`` found.
        limit: bytes.
        strips: by number of a convolution, in how many pieces to make its output.
    """
    strips = dict(strips or {})
    weights = list(matched.weights)
    layers: list[TiledLayer] = []
    number = sum(1 for _ in module.named_modules())
    for w, owners in candidates.items():
        whole = matched.weights[w]
        entry = whole.entry
        if entry.nbytes <= limit:
            continue
        cut = [owner for owner in owners if type(owner.module) not in _TABLES]
        slices: tuple[tuple[int, int], ...] = ()
        tiles: tuple[int, ...] = ()
        if cut:
            groups = lcm(*(_rows_of_a_group(owner.module) for owner in cut))
            # No tile makes rows of two of query, key and value.
            parts = 3 if any(owner.key == "in_proj_weight" for owner in cut) else 1
            rows, row_bytes = entry.shape[0] // parts, entry.nbytes // entry.shape[0]
            slices = tuple(
                (part * rows + start, part * rows + stop)
                for part in range(parts)
                for start, stop in row_slices(rows, row_bytes, limit, multiple=groups)
            )
            if len(slices) == 1:
                continue
            tiles = tuple(range(len(weights), len(weights) + len(slices)))
            weights += [Weight(t, *_piece(whole, s)) for t, s in zip(tiles, slices, strict=True)]
        weights[w] = Weight(w, whole.name, entry, f"in {len(tiles)} tiles" if tiles else "on the rows asked for")
        for at, name, child, key, user in owners:
            own = () if type(child) in _TABLES else tiles
            pieces = strips.pop(at, 1)
            if key != "weight":
                name = ".".join(filter(None, (name, key.removesuffix("_weight"))))
            layers.append(TiledLayer(name, type(child), at, 0, w, own, slices if own else (), pieces, key, user))
    for at, (name, child) in enumerate(module.named_modules()):
        if at in strips:
            whole_number = matched.numbers[id(child.weight)]
            layers.append(TiledLayer(name, type(child), at, 0, whole_number, strips=strips[at], user=at))
    numbered = []
    for layer in sorted(layers, key=lambda layer: layer.number):
        numbered.append(replace(layer, first=number))
        number += len(layer.tiles)
    if not numbered:
        return None
    projecting, attending = _roles(module, matched)
    return Tiling(limit, tuple(numbered), tuple(weights), _to_unfuse(module, numbered), projecting, attending)


def _roles(module: nn.Module, matched: Matched) -> tuple[frozenset[int], frozenset[int]]:
    """The weights that attentions use up to their queries, keys and values, and those they use afterwards."""
    before: set[int] = set()
    after: set[int] = set()
    for child in module.modules():
        if type(child) is nn.MultiheadAttention:
            for key, tensor in child.named_parameters():
                role = before if key in IN_WEIGHTS or key == "in_proj_bias" else after
                role.add(matched.numbers[id(tensor)])
    return frozenset(before), frozenset(after)


def _to_unfuse(module: nn.Module, layers: list[TiledLayer]) -> tuple[int, ...]:
    modules = [child for _, child in module.named_modules()]
    cut = {id(modules[number]) for layer in layers for number in (layer.number, layer.user)}
    return tuple(
        number
        for number, child in enumerate(modules)
        if can_unfuse(child) and any(id(inner) in cut for inner in child.modules())
    )


def _rows_of_a_group(child: nn.Module) -> int:
    """Output rows that only go together: those of one group of a grouped convolution."""
    layer: Any = child
    return layer.out_channels // layer.groups if type(child) in CONVOLUTIONS and layer.groups > 1 else 1


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
        if layer.table:
            child.__dict__["_narrowboat_rows"] = (rows, tiling.weights[layer.whole])
            forward = embedding_forward if layer.kind is nn.Embedding else bag_forward
            child.__dict__["forward"] = MethodType(forward, child)
            continue
        flag = getattr(child, layer.key).requires_grad
        tiles = [Tile(tiling.weights[t].entry, flag) for t in layer.tiles]
        numbers.update({id(tile.weight): t for tile, t in zip(tiles, layer.tiles, strict=True)})
        child.__dict__.setdefault(TILES, []).extend(tiles)
        if layer.kind is nn.MultiheadAttention:
            child.__dict__.setdefault(PROJECTIONS, {})[layer.key] = tiles, layer.slices
            continue
        child.__dict__[CUT] = Cut(layer.slices, layer.strips)
        forward = linear_forward if layer.kind in _LINEAR else convolution_forward
        child.__dict__["forward"] = MethodType(forward, child)
    for number in tiling.unfused:
        unfuse(modules[number])


def uninstall(module: nn.Module, tiling: Tiling) -> None:
    """Undo ``install``; wrappers put on since have to be off again."""
    modules = [child for _, child in module.named_modules()]
    for number in (*(layer.number for layer in tiling.layers), *tiling.unfused):
        for key in (TILES, CUT, PROJECTIONS, "_narrowboat_rows", "forward"):
            modules[number].__dict__.pop(key, None)


def whole_asked_for(weight: Weight) -> str:
    """What to say to an operator that wants the whole of a weight which is never in as a whole."""
    return (
        f"weight {weight.name!r} ({format_bytes(weight.entry.nbytes)}) is larger than the budget has room for, so its "
        f"layer computes {weight.tiled}, and an operator asked for the whole of it: read it from {weight.entry.file}, "
        "or raise the budget; if the model itself uses it outside its layer, give nb.stream() example inputs, so that "
        "this is known beforehand"
    )
