"""A tape whose pass ends before the loss: what the caller does between forward and backward is watched."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from narrowboat.errors import ReplayError
from narrowboat.train.tape.cells import witness
from narrowboat.train.tape.leaves import plain
from narrowboat.train.tape.run import TapeRun, _OpenFrame


class OpenRun(TapeRun):
    """The tape of a forward pass whose outputs and backward pass are in the caller's hands."""

    _outputs: tuple[tuple[torch.Tensor, int, tuple[int, ...]], ...] = ()

    def watch(self, outputs: Iterable[torch.Tensor]) -> None:
        """Before the forward pass ends: replays that begin with one of its outputs refuse one that was written to.

        Plain autograd allows it, as it did not save them; a replay would give other gradients.
        """
        watched = []
        for tensor in outputs:
            if plain(tensor) and self._numbers.get(tensor.untyped_storage()) in self._plan.captures:
                with self._own_operators():
                    watched.append((witness(tensor), tensor._version, tuple(tensor.shape)))
        self._outputs = tuple(watched)

    def _replay(self, frame: _OpenFrame) -> None:
        for alias, version, shape in self._outputs:
            if alias._version != version:
                raise ReplayError(
                    f"an output of shape {list(shape)} was changed in place after the forward pass, and activations "
                    "are computed again from it: change a clone of it"
                )
        super()._replay(frame)
