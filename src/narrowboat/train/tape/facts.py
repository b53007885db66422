"""What the tape has to know about an operator, found once per operator."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch

# Their schemas do not say that the running statistics are written to. The last three are seen as they are called only
# under inference mode; elsewhere they come apart into others.
_SILENT_WRITES = {
    "aten::native_batch_norm": (3, 4),
    "aten::batch_norm_update_stats": (1, 2),
    "aten::cudnn_batch_norm": (3, 4),
    "aten::miopen_batch_norm": (3, 4),
    "aten::batch_norm": (3, 4),
    "aten::_batch_norm_impl_index": (3, 4),
    "aten::instance_norm": (3, 4),
}

_CONTRACTIONS = (
    "conv",
    "mm",
    "linear",
    "matmul",
    "attention",
    "rnn",
    "lstm",
    "gru",
    "dot",
    "mv",
    "einsum",
    "fft",
    "solve",
)
_REDUCTIONS = ("sum", "mean", "norm", "softmax", "var", "std", "amax", "amin", "logsumexp", "cumsum", "prod", "loss")
_OTHERS = ("pool", "index", "gather", "scatter", "embedding", "sort", "topk", "unique", "im2col", "col2im", "upsample")


class Kind(Enum):
    """SAGE's categories of operators (MobiSys 2022; systems.md 3.2)."""

    MAP = "map"
    REDUCE = "reduce"
    CONTRACT = "contract"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class OpFacts:
    """Facts of one operator overload.

    Attributes:
        name: e.g. ``"aten::convolution"``.
        view: its result is always a view of its argument, so it makes and changes no storage.
        random: it draws from a random generator.
        writes: positions of arguments that it writes to.
        writes_named: names of keyword arguments that it writes to.
        kind: SAGE's category.
    """

    name: str
    view: bool
    random: bool
    writes: tuple[int, ...]
    writes_named: tuple[str, ...]
    kind: Kind


@cache
def facts_of(func: Any) -> OpFacts:
    """The facts of an operator overload, from its schema and its tags."""
    schema = func._schema
    name = str(schema.name)
    writes: list[int] = []
    named: list[str] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if not argument.kwarg_only:
                writes.append(position)
            named.append(argument.name)
    for position in _SILENT_WRITES.get(name, ()):
        writes.append(position)
        named.append(schema.arguments[position].name)
    return OpFacts(
        name=name,
        view=bool(getattr(func, "is_view", False)),
        random=torch.Tag.nondeterministic_seeded in func.tags,
        writes=tuple(writes),
        writes_named=tuple(named),
        kind=_kind_of(name.rpartition("::")[2], func),
    )


def _kind_of(name: str, func: Any) -> Kind:
    if any(word in name for word in _CONTRACTIONS):
        return Kind.CONTRACT
    if any(word in name for word in _OTHERS):
        return Kind.OTHER
    # A normalisation is a reduction and a map; its map is what is stored, and it costs two passes over memory.
    if name in ("native_batch_norm", "native_layer_norm", "native_group_norm", "_native_batch_norm_legit"):
        return Kind.MAP
    if any(word in name for word in _REDUCTIONS):
        return Kind.REDUCE
    if torch.Tag.pointwise in func.tags or func.is_view:
        return Kind.MAP
    return Kind.MAP if name in _PLAIN_MAPS else Kind.OTHER


_PLAIN_MAPS = frozenset(
    {"clone", "_to_copy", "copy_", "cat", "stack", "empty_like", "empty", "zeros", "ones", "full", "zeros_like"}
    | {"native_dropout", "bernoulli", "bernoulli_", "constant_pad_nd", "_unsafe_view", "gelu", "relu", "relu_"}
)
