"""PyTorch's attention with projections in tiles: its own code runs, and only the products with weights are made apart.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` hand all their weights to one fused operator where they
can. They do not where torch functions are overridden, so a mode that overrides nothing keeps them from it, in this
thread and for one call. What they call then is ``F.multi_head_attention_forward``; for it the mode makes query, key
and value beforehand, tile by tile, and runs its code with two names meaning something else: the in-projection gives
what has been made, and the output projection is left to a layer in tiles afterwards.

Stand-ins for the weights would need no such names, but the first operator of a process that meets a tensor with a
dispatcher of its own makes PyTorch load its distributed tensors: 41 MiB, of which a budget knows nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from narrowboat.profile.skeleton import TILES
from narrowboat.profile.tiled_forward import Tile, linear_rows

PROJECTIONS = "_narrowboat_projections"  # of an attention: by name of a weight, its tiles and their rows
# Where the rows of each weight belong: to the query, the key, the value, or one after the other to all three.
IN_WEIGHTS = {"in_proj_weight": 0, "q_proj_weight": 0, "k_proj_weight": 1, "v_proj_weight": 2}
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)

_ATTEND: FunctionType = F.multi_head_attention_forward  # type: ignore[assignment]
_NAMES = {"_in_projection", "linear", "has_torch_function"}  # exchanged; code without them is other code


def fuses(module: nn.Module) -> bool:
    """Whether the module may hand the weights of modules inside it to one operator."""
    return isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


def can_unfuse(module: nn.Module) -> bool:
    """Whether ``unfuse`` can keep it from that: subclasses have their own ideas of what to call."""
    if not set(_ATTEND.__code__.co_names) >= _NAMES:
        return False  # another version of PyTorch, with other code
    return type(module) in (nn.MultiheadAttention, nn.TransformerEncoderLayer) and "forward" not in module.__dict__


def unfuse(module: nn.Module) -> None:
    """Let an attention or encoder layer go step by step, on the instance."""
    forward: Callable[..., Any] = attention_forward if type(module) is nn.MultiheadAttention else encoder_layer_forward
    module.__dict__["forward"] = MethodType(forward, module)


def attention_forward(
    self: nn.MultiheadAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``nn.MultiheadAttention.forward`` without its fused operator, over tiles where it has some."""
    one = query is key and key is value
    if query.is_nested and one and self.batch_first and key_padding_mask is None and attn_mask is None:
        query, lengths, padding = _padded(query)
        out, weights = attention_forward(self, query, query, query, padding, need_weights, None, average_attn_weights)
        return _nested(out, lengths), weights
    options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
    with _Projecting(self):
        out, weights = nn.MultiheadAttention.forward(self, query, key, value, *options)
    if one and _would_fuse(self, query, key_padding_mask, attn_mask):
        out = out.contiguous()  # as the fused operator lays it out: code around may count on it
    return out, weights


def _would_fuse(self: nn.MultiheadAttention, query: torch.Tensor, *masks: torch.Tensor | None) -> bool:
    """Whether self-attention on ``query`` takes the fused operator where nobody keeps it from that."""
    plain = self.in_proj_weight is not None and self.in_proj_bias is not None and self.bias_k is None
    suits = plain and self.batch_first and self.num_heads % 2 == 0 and not self.add_zero_attn and not self.training
    floating = any(mask is not None and mask.is_floating_point() for mask in masks)
    return suits and query.dim() == 3 and not floating and not torch.is_autocast_enabled()


def encoder_layer_forward(
    self: nn.TransformerEncoderLayer,
    src: torch.Tensor,
    src_mask: torch.Tensor | None = None,
    src_key_padding_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """``nn.TransformerEncoderLayer.forward`` through the modules inside it, and not through a fused operator.

    Only the fused operator takes nested tensors (``nn.TransformerEncoder`` makes them where there is padding); here
    they are padded and masked, and nested again.
    """
    if src.is_nested and src_mask is None and src_key_padding_mask is None:
        dense, lengths, padding = _padded(src)
        return _nested(encoder_layer_forward(self, dense, None, padding), lengths)
    with _Unfused():
        out = nn.TransformerEncoderLayer.forward(self, src, src_mask, src_key_padding_mask, is_causal)
    if torch.is_autocast_enabled("cpu") and _layer_would_fuse(self, src):
        out = out.to(torch.get_autocast_dtype("cpu"))  # the fused operator casts everything; the norms do not
    return out


def _layer_would_fuse(self: nn.TransformerEncoderLayer, src: torch.Tensor) -> bool:
    """Whether an encoder layer takes the fused operator where nobody keeps it from that."""
    attention = self.self_attn
    plain = attention.in_proj_bias is not None and attention.in_proj_weight is not None
    suits = plain and attention.batch_first and attention.num_heads % 2 == 0 and not self.training
    alike = self.norm1.eps == self.norm2.eps and bool(self.activation_relu_or_gelu)
    return suits and alike and src.dim() == 3 and torch.backends.mha.get_fastpath_enabled()


class _Unfused(TorchFunctionMode):
    """Overrides nothing; while it is on, PyTorch's layers keep to what could be overridden."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Projecting(_Unfused):
    """Besides, makes the projections of one attention by tiles."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.multi_head_attention_forward:
            return func(*args, **kwargs)
        given = dict(_SIGNATURE.bind(*args, **kwargs).arguments)
        return _attend(self.attention, given)


def _attend(attention: nn.MultiheadAttention, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    cuts, apart = attention.__dict__.get(PROJECTIONS), TILES in attention.out_proj.__dict__
    instead: dict[str, Any] = {}
    if cuts:
        made = _project(attention, given, cuts)
        given.update(in_proj_weight=None, in_proj_bias=None, use_separate_proj_weight=True)
        given.update(dict.fromkeys(_SEPARATE, ()))  # asked for, and not used

        def hand_over(*sources: torch.Tensor) -> list[torch.Tensor]:
            # And not kept: attention lets go of them before its own result is made. Unbatched input is batched by now.
            return [made.pop(0).reshape(*source.shape[:-1], attention.embed_dim) for source in sources]

        instead["_in_projection"] = lambda query, key, value, *_: hand_over(query, key, value)
    if apart:
        instead["linear"] = lambda attended, *_: attended
    out, weights = _with_names(**instead)(**given)
    return attention.out_proj(out) if apart else out, weights


def _with_names(**instead: Any) -> Callable[..., Any]:
    """``F.multi_head_attention_forward``, where these names mean something else."""
    if not instead:
        return F.multi_head_attention_forward
    names = {**vars(F), "has_torch_function": lambda _: False, **instead}
    made = FunctionType(_ATTEND.__code__, names, _ATTEND.__name__, _ATTEND.__defaults__)
    made.__kwdefaults__ = _ATTEND.__kwdefaults__
    return made


def _project(attention: Any, given: dict[str, Any], cuts: dict[str, tuple[list[Tile], Any]]) -> list[Any]:
    """Query, key and value, made tile by tile."""
    rows, bias = attention.embed_dim, given["in_proj_bias"]
    # A copy, so that the bias itself is in use for this step only, and not through all the tiles.
    biases: Any = (None,) * 3 if bias is None else bias.clone().chunk(3)
    sources = [given[name] for name in ("query", "key", "value")]
    made: list[Any] = [None] * 3
    for part, key in enumerate(_SEPARATE):
        if "in_proj_weight" not in cuts and key not in cuts:
            made[part] = F.linear(sources[part], given[key], biases[part])
    for key, (tiles, slices) in cuts.items():
        for tile, (start, stop) in zip(tiles, slices, strict=True):
            part, first = IN_WEIGHTS[key] + start // rows, start % rows
            last = first + stop - start
            piece = None if biases[part] is None else biases[part][first:last]
            made[part] = tile(partial(linear_rows, sources[part], rows), first, last, piece, made[part])
    return made


def _padded(nested: torch.Tensor) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """The sequences of a nested tensor in one, their lengths, and where there is padding."""
    lengths = [row.shape[0] for row in nested.unbind()]
    dense = torch.nested.to_padded_tensor(nested, 0.0)
    padding = torch.arange(dense.shape[1])[None, :] >= torch.tensor(lengths)[:, None]
    return dense, lengths, padding


def _nested(dense: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(dense, lengths, strict=True)])
