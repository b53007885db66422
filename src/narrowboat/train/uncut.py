"""Batches that do not count samples along dimension 0: graphs with an adjacency matrix, sequence-first text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from narrowboat.machine.data_limit import is_out_of_memory
from narrowboat.train.loss import call_loss
from narrowboat.train.micro_batch import batch_size, copied, rows
from narrowboat.train.undisturbed import undisturbed

_TRIED = 2  # samples


def can_be_cut(model: nn.Module, loss_fn: Callable[..., Any] | None, inputs: Any, targets: Any) -> bool:
    """Whether model and loss take two samples of such a batch. True also where they do not take the whole of it.

    The model is left as it was.
    """
    samples = batch_size(inputs, targets)
    if samples <= _TRIED:
        return True
    few = tuple(rows(tree, samples, 0, _TRIED) for tree in (inputs, targets))
    return _passes(model, loss_fn, *few) or not _passes(model, loss_fn, inputs, targets)


def _passes(model: nn.Module, loss_fn: Callable[..., Any] | None, inputs: Any, targets: Any) -> bool:
    try:
        with undisturbed(model), torch.no_grad():
            call_loss(model, loss_fn, copied(inputs), copied(targets))
    except Exception as error:  # a model may refuse a batch in any way
        if is_out_of_memory(error):
            raise
        return False
    return True
