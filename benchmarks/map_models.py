"""Models that ``map`` is measured with, besides the zoo's: they wait for storage far longer than they compute.

In float32 a matrix-vector product runs at the speed of memory, ten times that of a good disk; a model that is
given one vector at a time has nothing else to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from narrowboat.zoo.llama import decoder


class Mlp:
    """Twelve linear layers of 4,096 by 4,096 in float32, one row at a time: 768 MiB of weights, each used once."""

    name = "mlp"
    __qualname__ = "mlp"

    def __call__(self) -> nn.Module:
        """The module."""
        layers = [layer for _ in range(12) for layer in (nn.Linear(4096, 4096), nn.ReLU())]
        return nn.Sequential(*layers)

    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """One row."""
        return (torch.zeros(1, 4096),)


class FloatDecoder:
    """Five layers of the zoo's decoder in float32, one token at a time: 1.31 GiB of weights."""

    name = "decoder_f32"
    __qualname__ = "decoder_f32"

    def __call__(self) -> nn.Module:
        """The module."""
        return decoder(torch.float32, num_hidden_layers=5, use_cache=False)

    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """One token."""
        return (torch.full((1, 1), 31_999),)


OWN: dict[str, Callable[[], Any]] = {"mlp": Mlp, "decoder_f32": FloatDecoder}


def factory(name: str) -> Any:
    """One of these, or of the zoo."""
    from narrowboat import zoo

    return OWN[name]() if name in OWN else zoo.get(name)
