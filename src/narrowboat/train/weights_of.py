"""Whether a model's weights have to stay on storage while it is trained, and the window to begin with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from narrowboat.arena.standin import is_streamed
from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import BudgetError, UsageError
from narrowboat.train.weights import TrainingWeights

_SHARE = 4  # the window to begin with is the budget over this; plans choose it anew


def weights_on_storage(
    model: nn.Module,
    source: str | Path | WeightsIndex | None,
    budget: int,
    *,
    store: Path | None,
    resume: bool,
) -> TrainingWeights | None:
    """Put the weights of a skeleton, or of a streamed model, on storage for training; None where all are in memory.

    Args:
        model: to be trained.
        source: the weights file or folder; None for a streamed model's own.
        budget: bytes for everything.
        store: a folder for weights that are trained and have no memory.
        resume: go on from the last whole step there.

    Raises:
        UsageError: there are weights without memory and no source.
        BudgetError: not even one operator's weights fit.
    """
    streamed = any(is_streamed(parameter) for parameter in model.parameters())
    skeleton = any(parameter.device.type == "meta" for parameter in model.parameters())
    if source is None and not streamed:
        if skeleton:
            raise UsageError("the model is a skeleton (weights on meta): give its weights file or folder (weights=)")
        return None
    trained = any(p.requires_grad and (p.device.type == "meta" or is_streamed(p)) for p in model.parameters())
    folder = store if trained else None
    window = max(budget // _SHARE, 1)
    for _ in range(2):
        try:
            return TrainingWeights.of(model, source, window, store=folder, resume=resume)
        except BudgetError as error:
            if error.minimum > budget or error.minimum <= window:
                raise
            window = error.minimum
    raise BudgetError("the window of weights does not fit", minimum=window)
