"""Passes that are refused before they begin."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.errors import GradientError, StreamedModelError


def refuse_training(weights: Iterable[Weight], norms: Iterable[nn.Module]) -> None:
    """Streamed weights are read-only, and what autograd would keep of them leaves memory.

    Args:
        weights: the model's.
        norms: its layers with running statistics.

    Raises:
        GradientError: the call would record gradients.
        StreamedModelError: a normalisation layer is in training mode.
    """
    if torch.is_grad_enabled() and any(slot.tensor.requires_grad for weight in weights for slot in weight.slots):
        raise GradientError(
            "this call would record gradients through streamed weights: wrap it in torch.inference_mode() or "
            "torch.no_grad(); or train the plain model inside a budget with nb.train_step"
        )
    if any(norm.training for norm in norms):
        raise StreamedModelError(
            "the model is in training mode, and its normalisation layers would write running statistics into "
            "streamed weights: call model.eval()"
        )


def refuse_moving_written(weights: Iterable[Weight]) -> None:
    """Before weights move.

    Raises:
        StreamedModelError: one was written to since it came in: that would be lost.
    """
    for weight in weights:
        if any(slot.other is not None and slot.written for slot in weight.slots):
            raise StreamedModelError(
                f"weight {weight.name!r} was modified in place, and the change would be lost if it had to move: "
                "save the weights, pack them, and stream the model from the new file"
            )
