"""One zoo entry: a factory that takes no arguments, with its inputs and, where there are any, its real weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowboat.errors import ModelError, WeightsNotFoundError

if TYPE_CHECKING:
    import torch
    from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A published architecture; call it to build the module.

    Attributes:
        name: its name on the command line, ``narrowboat.zoo:NAME``.
        description: what it is, in one line.
        build: returns the module; may leave it in training mode.
        inputs: ``inputs(batch, generator)`` returns the tuple of positional arguments.
        extra: the extra to install when a package that this entry needs is missing; empty if none is needed.
        find_weights: returns the path of the real weights; None where there are only random ones.
        image_mean: what an image's channels in [0, 1] are reduced by, for this model's weights.
        image_std: what they are then divided by.
    """

    name: str
    description: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]
    extra: str = ""
    find_weights: Callable[[], Path] | None = None
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self) -> nn.Module:
        """Build the module, in eval mode.

        Raises:
            ModelError: a package it needs is not installed.
        """
        try:
            return self.build().eval()
        except ModuleNotFoundError as error:
            raise ModelError(self._missing(error)) from error

    def example_inputs(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """The positional arguments of one pass over ``batch`` samples, the same in every process."""
        import torch

        return self.inputs(batch, torch.Generator().manual_seed(0))

    def weights(self) -> Path:
        """The file with the real weights.

        Raises:
            WeightsNotFoundError: there are none, or the package that carries them is not installed.
        """
        if self.find_weights is None:
            raise WeightsNotFoundError(
                f"zoo model {self.name!r} has no published weights at hand: "
                f"make random ones with 'narrowboat zoo save {self.name} -o FILE'"
            )
        try:
            return self.find_weights()
        except ModuleNotFoundError as error:
            raise WeightsNotFoundError(self._missing(error)) from error

    def _missing(self, error: ModuleNotFoundError) -> str:
        install = f"pip install 'narrowboat[{self.extra}]'" if self.extra else f"pip install {error.name}"
        return f"zoo model {self.name!r} needs the package {error.name!r}, which is not installed: {install}"


def on_call(target: str) -> Callable[..., Any]:
    """A function that imports ``target`` (``"package.module:function"``) when called, and not before."""

    def call(*args: Any) -> Any:
        module, _, function = target.partition(":")
        return getattr(importlib.import_module(module), function)(*args)

    return call


def images(channels: int, height: int, width: int) -> Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]:
    """Inputs: one float32 tensor [batch, channels, height, width], standard normal as normalised images are."""

    def make(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        import torch

        return (torch.randn(batch, channels, height, width, generator=generator),)

    return make


def token_ids(vocabulary: int, length: int) -> Callable[[int, torch.Generator], tuple[torch.Tensor, ...]]:
    """Inputs: one int64 tensor [batch, length] of ids in [0, vocabulary)."""

    def make(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        import torch

        return (torch.randint(vocabulary, (batch, length), generator=generator),)

    return make
