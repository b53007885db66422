"""MODEL on the command line as a Hugging Face folder: its own class, weights and example inputs."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from narrowboat.checkpoint import WeightsIndex
    from narrowboat.profile.pretrained import Pretrained

_TOKENS = 64  # of the example


class FolderModel:
    """A factory over a model folder; each call makes another module, so that nothing is shared between two models.

    Args:
        folder: with ``config.json`` and weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = str(folder)
        self.__qualname__ = str(folder)

    def __call__(self) -> nn.Module:
        """The module, in eval mode, its parameters without storage."""
        from narrowboat.profile.pretrained import open_pretrained

        return open_pretrained(self.folder).model

    def index(self) -> WeightsIndex:
        """The weights at rest, under the model's names."""
        return self._opened.index

    @cached_property
    def _opened(self) -> Pretrained:
        from narrowboat.profile.pretrained import open_pretrained

        return open_pretrained(self.folder)

    def weights(self) -> Path:
        """Where the weights are."""
        return self.folder

    def example_inputs(self, batch: int = 1) -> tuple[Any, ...]:
        """The positional arguments of a pass: ``batch`` rows of 64 token numbers, or images of the model's size.

        Raises:
            ModelError: the model takes something else.
        """
        from narrowboat.errors import ModelError
        from narrowboat.profile.pretrained import first_input

        first = first_input(self._opened, batch, _TOKENS)
        if first is None:
            raise ModelError(f"{self.folder} takes neither token numbers nor pixels first: use it from Python")
        return (first,)
