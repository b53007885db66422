"""What a child of the inference part does: write a weights file, or run one subject at several batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import narrowboat as nb
from cuda_kit.batches import hidden, next_batch
from cuda_kit.children import Emit
from cuda_kit.models import Spec, specs, write_weights
from cuda_kit.place import Place
from cuda_kit.runner import Model, Passes, Runner
from cuda_kit.streamed import Ask, Streamed
from cuda_kit.subjects import Budget, load_peer, resident

_UNIFIED_BESIDE = 1 << 30  # bytes, for the passes of a small model


@dataclass(frozen=True, slots=True)
class Order:
    """What all subjects of one model are told.

    Attributes:
        model: its name.
        small: the small shape.
        path: of the weights file.
        device: as ``Place`` takes it.
        passes: as ``Passes`` takes them.
        outputs: folder of resident's answers.
        weight_bytes: of the model.
    """

    model: str
    small: bool
    path: str
    device: str
    passes: dict[str, Any]
    outputs: str
    weight_bytes: int

    def begin(self, emit: Emit, *, reference: bool = False) -> tuple[Spec, Place, Runner]:
        """What every subject begins with; event ``context``: what the driver counts before anything is computed."""
        place, spec = Place(self.device), specs(small=self.small)[self.model]
        if place.is_cuda:
            torch.zeros(1, device=place.torch_device)
            place.settle()
        emit("context", held=place.held())
        return spec, place, Runner(emit, spec, place, Passes(**self.passes), self.outputs, reference=reference)


def write(emit: Emit, *, model: str, small: bool, path: str, device: str) -> None:
    """Event ``written``: bytes of the tensors. On a GPU the numbers are made there."""
    emit("written", bytes=write_weights(specs(small=small)[model], Path(path), Place(device).torch_device))


def run_resident(
    emit: Emit, *, order: dict[str, Any], copy_seconds: float, most: int, batches: list[int] | None
) -> None:
    """Plain PyTorch: at these batch sizes, or doubling until computing is clearly longer than ``copy_seconds``."""
    told = Order(**order)
    spec, place, runner = told.begin(emit, reference=True)
    loaded = Model(resident(spec, Path(told.path), place))
    done: dict[int, float] = {}
    while (batch := _next(batches, done, copy_seconds, most)) is not None:
        seconds = runner.batch(batch, lambda: loaded)
        if seconds is None:
            return
        done[batch] = seconds


def _next(batches: list[int] | None, done: dict[int, float], copy_seconds: float, most: int) -> int | None:
    if batches is None:
        return next_batch(done, copy_seconds, most)
    return next((batch for batch in batches if batch not in done), None)


def run_peer(
    emit: Emit, *, order: dict[str, Any], subject: str, batches: list[int], weights_budget: int, beside: int
) -> None:
    """One of the others, at these batch sizes."""
    told = Order(**order)
    spec, place, runner = told.begin(emit)
    called, settle = load_peer(subject, spec, Path(told.path), place, Budget(weights_budget, beside))
    loaded = Model(called, settle, torch.no_grad)  # as they all document it
    for batch in batches:
        runner.batch(batch, lambda: loaded)


def run_narrowboat(
    emit: Emit,
    *,
    order: dict[str, Any],
    divisor: float,
    batches: list[int],
    residents: dict[str, float],
    host: int | None,
) -> None:
    """narrowboat, a session for each batch size, up to the first at which the copies are hidden.

    Args:
        emit: takes the events.
        order: see ``Order``.
        divisor: the weights' bytes over those of the device that are for them.
        batches: sizes.
        residents: resident's seconds by batch size; empty to go on in any case.
        host: bytes of pinned host memory; None for as many as all weights take.
    """
    told = Order(**order)
    spec, place, runner = told.begin(emit)
    accelerator = place.open()
    for batch in batches:
        ask = Ask(spec, Path(told.path), place, accelerator, batch, told.weight_bytes, divisor, host)
        seconds = runner.batch(batch, ask.load)
        ask.close()
        if seconds is not None and hidden(seconds, residents.get(str(batch))):
            return


def run_unified(emit: Emit, *, order: dict[str, Any], batches: list[int]) -> None:
    """narrowboat on a device taken for one that shares the host's memory: kernels read weights over the bus."""
    told = Order(**order)
    spec, place, runner = told.begin(emit)
    accelerator, room = place.open_unified(), 2 * told.weight_bytes + _UNIFIED_BESIDE
    for batch in batches:
        opened: list[nn.Module] = []

        def load(batch: int = batch, opened: list[nn.Module] = opened) -> Model:
            example = spec.inputs(batch)
            opened.append(nb.stream(spec.build, told.path, budget=room, device=accelerator, example=example).eval())
            return Streamed(opened[0], {})

        runner.batch(batch, load)
        for module in opened:
            nb.session(module).close()
