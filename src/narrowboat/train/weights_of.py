"""Whether a model's weights have to stay on storage while it is trained, and the window to begin with."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from narrowboat.arena.standin import is_streamed
from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import BudgetError, UsageError, WeightsMismatchError
from narrowboat.train.state.kept import Kept, check_vacant, newest_whole
from narrowboat.train.weights import TrainingWeights

_FILES = ("weights", "optimizer")  # in the folder: a step is whole where both have it
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
        UsageError: there are weights without memory and no source; there is nothing to resume, or a run not resumed.
        SpillError: what is to be resumed is damaged, incomplete, or of more than one step or run.
        BudgetError: not even one operator's weights fit.
        WeightsMismatchError: the source does not have what the model lacks.
    """
    streamed = any(is_streamed(parameter) for parameter in model.parameters())
    skeleton = any(parameter.device.type == "meta" for parameter in model.parameters())
    if source is None and not streamed and skeleton:
        raise UsageError("the model is a skeleton (weights on meta): give its weights file or folder (weights=)")
    trained = any(p.requires_grad and (p.device.type == "meta" or is_streamed(p)) for p in model.parameters())
    folder = store if trained else None
    kept = _left_by_a_run(folder, trained=trained, resume=resume)
    if source is None and not streamed:
        return None
    window = max(budget // _SHARE, 1)
    for _ in range(2):
        try:
            generation = kept.generation if kept is not None else None
            return TrainingWeights.of(model, source, window, store=folder, resume=resume, generation=generation)
        except WeightsMismatchError as error:
            hint = _hint(error, model)
            if not hint:
                raise
            raise WeightsMismatchError(f"{error}; {hint}") from error
        except BudgetError as error:
            if error.minimum > budget or error.minimum <= window:
                raise
            window = error.minimum
    raise BudgetError("the window of weights does not fit", minimum=window)


def _left_by_a_run(folder: Path | None, *, trained: bool, resume: bool) -> Kept | None:
    """What is gone on from; None where the run begins."""
    if not resume:
        if folder is not None:
            check_vacant(folder, _FILES)
        return None
    if not trained:
        raise UsageError(
            "resume=True goes on with weights that are trained on storage (on meta, with weights= and spill=), and "
            "all that this model trains is in memory: leave it out, and load what you saved with "
            "model.load_state_dict() and optimizer.load_state_dict()"
        )
    if folder is None:
        raise UsageError("resume=True goes on from what a run left in its folder: name that folder (spill=)")
    return newest_whole(folder, _FILES)


def _hint(error: WeightsMismatchError, model: nn.Module) -> str:
    """What to do about buffers that no weights file has; "" where the error is not about such."""
    saved = model.state_dict().keys()
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved]
    if not any(f"buffer {name} " in str(error) for name in lost):
        return ""
    return (
        f"such buffers ({lost[0]}) are computed when the model is built and are in no weights file: use "
        "nb.stream_pretrained(FOLDER), or build the model with its buffers in memory (accelerate's "
        "init_empty_weights() puts only parameters on meta)"
    )
