"""Before any plan is trusted: what is computed again on a few samples has the bits of the original."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from narrowboat.machine.data_limit import is_out_of_memory
from narrowboat.train.measure.real import untouched
from narrowboat.train.micro_batch import batch_size, copied, rows
from narrowboat.train.plan import Planner
from narrowboat.train.tape.cells import fingerprint
from narrowboat.train.tape.frames import StepPlan
from narrowboat.train.tape.run import TapeRun, without_autocast

log = logging.getLogger("narrowboat")
_SAMPLES = 2

Forward = Callable[[Any, Any], torch.Tensor]
Gradients = list[torch.Tensor | None]


def keep_what_differs(planner: Planner, model: nn.Module, forward: Forward, inputs: Any, targets: Any) -> None:
    """Check what the planner's plans may replay, and have it plan without what does not come back bit by bit.

    Args:
        planner: of this model.
        model, forward, inputs, targets: as for ``check_replays``.
    """
    unsafe = planner.premises.unsafe
    # Until it is well: an operator that fails hides what comes after it.
    while (everything := planner.replay_of_everything()) is not None:
        wrong = check_replays(model, forward, everything, inputs, targets)
        if wrong <= planner.premises.unsafe:
            break
        planner.forget(wrong)
    if found := planner.premises.unsafe - unsafe:
        log.warning("%d activations do not come back bit by bit and are kept instead", len(found))


def check_replays(model: nn.Module, forward: Forward, step: StepPlan, inputs: Any, targets: Any) -> frozenset[int]:
    """Storages that replays bring back with other bits or not at all, or that move a buffer; over two samples.

    Memory that an operator leaves unwritten (the workspaces of recurrent layers) may differ without harm: where the
    gradients have the bits of the plain pass, nothing is wrong.

    Args:
        model: is left as it was, its gradients and the random streams too.
        forward: gives the loss of inputs and targets.
        step: should replay as much as any plan may.
        inputs, targets: one batch.

    Returns:
        Numbers of storages; none where there is no memory for the comparison.
    """
    samples = batch_size(inputs, targets)
    few = [rows(tree, samples, 0, min(samples, _SAMPLES)) for tree in (inputs, targets)]
    run = TapeRun(step, check=True)
    try:
        again, moving = _gradients(model, forward, few, run)
        if not run.wrong or _same(again, _gradients(model, forward, few, None)[0]):
            return frozenset(moving)
        return frozenset(run.wrong | moving)
    except Exception as error:
        if is_out_of_memory(error):
            return frozenset()
        # What does not run again from plain memory (quantized tensors); an error of the model's own comes again.
        _gradients(model, forward, few, None)
        if not (failed := run.touched_last()):
            raise
        return frozenset(failed)
    finally:
        run.close()


def _gradients(model: nn.Module, forward: Forward, few: list[Any], run: TapeRun | None) -> tuple[Gradients, set[int]]:
    """The gradients; and what is made by operators whose replay wrote to a buffer without saying so."""
    moving: set[int] = set()
    some_inputs, some_targets = copied(few[0]), copied(few[1])
    with untouched(model):
        if run is None:
            loss = forward(some_inputs, some_targets)
        else:
            with run.forward():
                loss = forward(some_inputs, some_targets)
        before = [(buffer, fingerprint(buffer)) for buffer in model.buffers()] if run is not None else []
        with without_autocast():
            loss.backward()
        if run is not None:
            moving = run.made_from(buffer for buffer, bits in before if fingerprint(buffer) != bits)
        return [parameter.grad for parameter in model.parameters()], moving


def _same(these: Gradients, those: Gradients) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(these, those, strict=True)
    )
