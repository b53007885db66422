"""A model to run: what a person named, its weights and its inputs, found together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowboat.errors import UsageError
from narrowboat.zoo.folder import FolderModel
from narrowboat.zoo.resolve import ResolvedModel, resolve_model

if TYPE_CHECKING:
    from torch import nn

    from narrowboat.checkpoint import WeightsIndex


@dataclass(frozen=True, slots=True)
class Request:
    """A model to run, found.

    Attributes:
        resolved: the MODEL argument.
        factory: makes the module, in eval mode.
        weights: the weights file or folder.
        inputs: positional arguments of a pass; None where the model names no example and none was given.
    """

    resolved: ResolvedModel
    factory: Callable[[], nn.Module]
    weights: Path
    inputs: tuple[Any, ...] | None

    @property
    def source(self) -> Path | WeightsIndex:
        """What to stream from: the weights, under the names that the model gives them."""
        folder = self.resolved.factory
        return folder.index() if isinstance(folder, FolderModel) and self.weights == folder.folder else self.weights

    def need_inputs(self) -> tuple[Any, ...]:
        """The inputs.

        Raises:
            UsageError: there are none.
        """
        if self.inputs is None:
            raise UsageError(
                f"{self.resolved.spec} has no example_inputs(): give --input FILE, an image or a .npy array"
            )
        return self.inputs


def find_request(spec: str, weights: Path | None, source: Path | None = None) -> Request:
    """Find the model, its weights (the factory's own ``weights()`` if none are given) and its inputs.

    Raises:
        UsageError: no such model, no weights, or an input that cannot be read.
    """
    resolved = resolve_model(spec)
    if weights is None:
        find = getattr(resolved.factory, "weights", None)
        if not callable(find):
            raise UsageError(f"{spec} brings no weights of its own: give --weights FILE")
        weights = Path(find())
    return Request(resolved, _in_eval_mode(resolved.factory), weights, resolved.inputs(source))


def _in_eval_mode(factory: Callable[..., Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torch import nn

        # A module that exists already is left as it is, to be made from again.
        made = copy.deepcopy(factory) if isinstance(factory, nn.Module) else factory()
        return made.eval() if isinstance(made, nn.Module) else made

    make.__qualname__ = str(getattr(factory, "__qualname__", None) or getattr(factory, "name", repr(factory)))
    return make
