"""A ``transformers.Trainer`` inside a byte budget.

    trainer = Trainer(model, args, train_dataset=...)
    use_budget(trainer, budget="2GiB")
    trainer.train()

The model's forward pass runs on a recompute plan (:func:`narrowboat.checkpoint_plan`); everything else, gradient
accumulation, clipping, mixed precision, schedulers, saving and resuming, is the Trainer's own. No batch is split, so
losses, gradients and weights are those of the plain Trainer, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from narrowboat.errors import UsageError
from narrowboat.train.recompute import PlannedForward


def use_budget(
    trainer: Trainer,
    *,
    budget: int | str,
    spill: str | Path | None = None,
    techniques: Iterable[str] | None = None,
) -> PlannedForward:
    """Make a Trainer's training passes run inside a budget; call it before ``trainer.train()``.

    Each shape of batch is measured when it first comes: a collator that pads to multiples makes fewer of them.

    Args:
        trainer: its model is changed in place, as by ``checkpoint_plan``.
        budget: bytes for weights, buffers, gradients, optimizer state, the batch, and activations. An int, "2GiB", or
            "auto" (what the machine can spare).
        spill: a folder for activations; None for no storage.
        techniques: among "recompute", "reduce", "compact" and "spill"; None for all.

    Returns:
        What ``trainer.model.narrowboat`` is: ``.plan``, ``.budget``, ``.close()``. ``trainer.train()`` raises
        BudgetError where no plan fits, before the batch is used.

    Raises:
        UsageError: the Trainer recomputes by itself (``gradient_checkpointing``), or an option cannot be used.
    """
    if getattr(trainer.args, "gradient_checkpointing", False):
        raise UsageError("gradient_checkpointing=True recomputes already: leave it out, the plan takes its place")
    if not isinstance(trainer.model, torch.nn.Module):
        raise UsageError("the Trainer has no model yet (model_init): give it the model itself")
    planned = PlannedForward(trainer.model, budget, spill=spill, techniques=techniques)
    trainer.add_callback(_CountOptimizer(planned))
    return planned


class _CountOptimizer(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """The optimizer is made when training begins."""

    def __init__(self, planned: PlannedForward) -> None:
        self._planned = planned

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        # Accelerate wraps it.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._planned.optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else []
