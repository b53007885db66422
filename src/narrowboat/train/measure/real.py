"""A training pass on a few real samples: its durations, and the tape where fake tensors cannot give it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from narrowboat.train.measure.clock import HOST, Clock
from narrowboat.train.measure.meter import walk
from narrowboat.train.micro_batch import batch_size, copied, rows
from narrowboat.train.random_state import RandomState
from narrowboat.train.tape.structure import Tape
from narrowboat.train.undisturbed import Attributes, undisturbed


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever passes inside do to buffers, gradients, attributes and random streams is undone at the end."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        with undisturbed(model):
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def real_walk(
    model: nn.Module,
    forward: Callable[[Any, Any], torch.Tensor],
    inputs: Any,
    targets: Any,
    batch: int,
    *,
    repeat: int = 1,
    clock: Clock = HOST,
) -> Tape:
    """Write down a training pass over the first ``batch`` samples, with durations of plain passes; nothing changes.

    Args:
        repeat: passes before the one that is written down, to warm up kernels and allocator.
        clock: of what runs the operators.

    Raises:
        Exception: whatever the model or the loss raises.
    """
    size = batch_size(inputs, targets)
    some_inputs, some_targets = rows(inputs, size, 0, batch), rows(targets, size, 0, batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with untouched(model):
        plain = []
        for _ in range(repeat + 1):
            plain.append(_timed(forward, copied(some_inputs), copied(some_targets), clock))
            for parameter in parameters:
                parameter.grad = None
        random, attributes = RandomState(), Attributes(model.modules())
        # For models that write to their inputs; made before the passes are watched.
        copies = [(copied(some_inputs), copied(some_targets)) for _ in range(2)]

        def loss() -> torch.Tensor:
            # Both passes of the walk take the same turns.
            random.restore()
            attributes.restore()
            return forward(*copies.pop())

        tape = walk(model, loss, parameters, batch, clock=clock)
    return _with_plain_times(tape, *min(plain, key=sum))


def _timed(
    forward: Callable[[Any, Any], torch.Tensor], inputs: Any, targets: Any, clock: Clock
) -> tuple[float, float]:
    start = clock.mark()
    loss = forward(inputs, targets)
    between = clock.mark()
    loss.backward()
    end = clock.mark()
    return clock.seconds(start, between), clock.seconds(between, end)


def _with_plain_times(tape: Tape, forward: float, backward: float) -> Tape:
    """Durations as they are when nobody writes them down: operators' shares of the plain passes."""
    noted = sum(op.seconds for op in tape.ops)
    factor = min(1.0, forward / noted) if noted else 1.0
    later = backward / tape.backward_seconds if tape.backward_seconds else 1.0
    return replace(
        tape,
        ops=[op.paced(op, factor) for op in tape.ops],
        backward=[replace(event, seconds=event.seconds * later) for event in tape.backward],
        forward_seconds=forward,
        backward_seconds=backward,
        overhead=max(0.0, tape.forward_seconds - forward),
    )
