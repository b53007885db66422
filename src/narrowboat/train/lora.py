"""Low-rank adaptation: beside each frozen linear layer two small matrices that are trained.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021, arXiv:2106.09685): ``W x + (alpha / r) B A x``
with ``A`` of r rows and ``B`` of r columns; ``B`` begins as zero, so that training begins from the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from narrowboat.arena.standin import is_standin
from narrowboat.errors import UsageError

_BYPASSES = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # they hand their layers' weights to one operator


class LoraLinear(nn.Linear):
    """A frozen linear layer (its own ``weight`` and ``bias``, under their own names) with an adapter beside it.

    Args:
        linear: the layer; its parameter objects are taken over, wherever their bytes are.
        rank: rows of ``A``.
        alpha: the adapter's product is multiplied by ``alpha / rank``.
        dropout: probability with which the adapter's inputs are zeroed in training mode.

    Attributes:
        lora_A, lora_B: ``[rank, in_features]`` and ``[out_features, rank]``, in float32 unless the layer is wider.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        dtype = torch.promote_types(linear.weight.dtype, torch.float32)
        self.lora_A = nn.Linear(self.in_features, rank, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(rank, self.out_features, bias=False, dtype=dtype)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the layer's dtype."""
        out = F.linear(input, self.weight, self.bias)
        low = self.lora_B(self.lora_A(self.dropout(input.to(self.lora_A.weight.dtype))))
        return out + (low * self.scaling).to(out.dtype)


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Sequence[str] = ("q_proj", "v_proj"),
    dropout: float = 0.0,
) -> list[nn.Parameter]:
    """Freeze a model and put adapters beside its linear layers; returns what is trained, for the optimizer.

    Works on a skeleton or a streamed model too: the adapters are in memory, the model's own weights where they are.

    Args:
        model: changed in place. All its parameters are frozen.
        rank: of the adapters.
        alpha: their weight is ``alpha / rank``.
        targets: the last parts of the names of the layers, e.g. ``"q_proj"``; one or several.
        dropout: on the adapters' inputs, in training mode.

    Raises:
        UsageError: no linear layer has such a name, or a number cannot be used.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UsageError(f"rank must be a positive whole number, not {rank!r}")
    if not 0.0 <= dropout < 1.0:
        raise UsageError(f"dropout must be at least 0 and below 1, not {dropout!r}")
    targets = (targets,) if isinstance(targets, str) else targets
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if name in targets and isinstance(child, nn.Linear)
    ]
    if not found:
        raise UsageError(f"no nn.Linear of this model is called {' or '.join(map(repr, targets))}: give other targets")
    for parent, name, child in found:
        if isinstance(parent, _BYPASSES) or type(child).forward not in (nn.Linear.forward, LoraLinear.forward):
            raise UsageError(
                f"{name} of {type(parent).__name__} cannot have an adapter: its weight is used without calling the "
                "layer, or the layer computes otherwise than nn.Linear; give other targets"
            )
    if any(isinstance(child, LoraLinear) for _, _, child in found):
        raise UsageError("this model has adapters already: merge them first, or leave them")
    model.requires_grad_(False)
    replaced: dict[nn.Linear, LoraLinear] = {}  # a layer used in several places stays one layer
    for parent, name, linear in found:
        if linear not in replaced:
            replaced[linear] = LoraLinear(linear, rank, alpha, dropout)
        setattr(parent, name, replaced[linear])
    return [p for layer in replaced.values() for part in (layer.lora_A, layer.lora_B) for p in part.parameters()]


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters alone, by name; to be saved, and loaded with ``load_state_dict(..., strict=False)``."""
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if name.endswith((".lora_A.weight", ".lora_B.weight"))
    }


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add each adapter to its layer's weight and take it away; the layers are plain linear layers again.

    Raises:
        UsageError: a layer's weight is on storage or has no memory: load the model in full, then its adapters.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLinear)]
    if any(is_standin(layer.weight) or layer.weight.is_meta for layer in layers):
        raise UsageError(
            "adapters can only be merged into weights in memory: save them with lora_state_dict, load the model in "
            "full, add_lora, load them, then merge"
        )
    for parent in list(model.modules()):
        for name, layer in list(parent._modules.items()):
            if isinstance(layer, LoraLinear):
                setattr(parent, name, _merged(layer))


def _merged(layer: LoraLinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    if not hasattr(layer, "_narrowboat_merged"):  # once, for a layer used in several places
        product = layer.lora_B.weight @ layer.lora_A.weight
        layer.weight += (product * layer.scaling).to(layer.weight.dtype)
        layer.__dict__["_narrowboat_merged"] = plain
    plain = layer.__dict__["_narrowboat_merged"]
    plain.weight, plain.bias = layer.weight, layer.bias
    plain.train(layer.training)
    return plain
