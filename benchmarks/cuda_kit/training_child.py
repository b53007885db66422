"""One training step on the device, as plain PyTorch, with recompute in every block, or inside a budget."""

from __future__ import annotations

import inspect
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import narrowboat as nb
from cuda_kit.children import Emit, NotAvailable
from cuda_kit.place import Place
from narrowboat.zoo.gpt import GPT

_WARM = 2  # steps that are not timed, after the one that is compared
_PLENTY = 64  # times the weights' bytes: a budget in which an emulated device's plain step fits

Batch = tuple[torch.Tensor, torch.Tensor]


def run(
    emit: Emit,
    *,
    device: str,
    shape: dict[str, int],
    subject: str,
    steps: int,
    budget: int | None,
    host: int,
    reference: str,
) -> None:
    """Gradients of a first step, compared with plain's; then timed ones.

    Events: ``gradients`` (distance from plain's, relative), ``step`` (seconds), ``end`` (peaks in bytes, and what
    narrowboat tells).

    Args:
        emit: takes the events.
        device: as ``Place`` takes it.
        shape: of the model and the batch.
        subject: ``plain``, ``recompute`` or ``narrowboat``.
        steps: timed.
        budget: bytes of the device; narrowboat's alone.
        host: bytes of pinned host memory.
        reference: file of plain's gradients; written by plain if it is not there.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before there is a handle: the same bits every time
    place = Place(device)
    module, optimizer, batch = _make(place, shape)
    step = _narrow(place, module, optimizer, budget, host) if subject == "narrowboat" else None
    if subject == "recompute":
        for block in module.blocks:
            block.forward = _recomputed(block.forward)
    if step is not None:
        step.prepare(*batch)  # measured as it is run later
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if step is not None:
        step.backward(*batch)
    else:
        _loss(module(batch[0]), batch[1]).backward()
    emit("gradients", **_compare(module, Path(reference), write=subject == "plain"))
    torch.use_deterministic_algorithms(False)
    optimizer.zero_grad(set_to_none=True)

    def once() -> None:
        if step is not None:
            step(*batch)
            return
        optimizer.zero_grad(set_to_none=True)
        _loss(module(batch[0]), batch[1]).backward()
        optimizer.step()

    for _ in range(_WARM):
        once()
    static = _static(module, optimizer)
    place.settle()
    place.reset_peaks()
    for _ in range(steps):
        emit("step", seconds=place.timed(once)[0])
    peaks = place.peaks()
    told: dict[str, Any] = {"static_bytes": static}
    if peaks is not None:
        told |= {"allocated_bytes": peaks[0], "reserved_bytes": peaks[1]}
    if step is not None:
        told |= _told(step)
    emit("end", **told)


def foresee(emit: Emit, *, device: str, shape: dict[str, int], host: int) -> None:
    """What a plain step takes on an emulated device, whose memory nobody counts: event ``foreseen``, of the plan."""
    place = Place(device)
    module, optimizer, batch = _make(place, shape)
    weights = sum(p.nbytes for p in module.parameters())
    plenty = min(weights * _PLENTY, place.total())
    plan = _narrow(place, module, optimizer, plenty, host).prepare(*batch)
    emit("foreseen", allocated_bytes=plan.plain_peak, static_bytes=plan.static.total)


def _make(place: Place, shape: dict[str, int]) -> tuple[GPT, torch.optim.Optimizer, Batch]:
    """The same weights and batch in every process."""
    torch.manual_seed(0)
    module = GPT(shape["vocabulary"], shape["length"], shape["width"], shape["layers"], shape["heads"]).train()
    module.to(place.torch_device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(shape["vocabulary"], (shape["batch"], shape["length"] + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return module, optimizer, (inputs.to(place.torch_device), targets.to(place.torch_device))


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def _narrow(place: Place, module: nn.Module, optimizer: torch.optim.Optimizer, budget: int | None, host: int) -> Any:
    """The step inside a budget.

    Raises:
        NotAvailable: ``train_step`` knows no device.
    """
    if "device" not in inspect.signature(nb.TrainStep).parameters:
        raise NotAvailable("train_step takes no device: it trains on the processor only")
    assert budget is not None
    return nb.train_step(
        module, _loss, optimizer, budget={"cuda": budget, "cpu": host}, device=place.open(), adapt=False
    )


def _compare(module: nn.Module, path: Path, *, write: bool) -> dict[str, Any]:
    """Distance of the gradients from plain's, relative to their length; 0.0 for the same bits."""
    mine = {name: p.grad.detach().cpu() for name, p in module.named_parameters() if p.grad is not None}
    if not path.exists():
        if write:
            torch.save(mine, path)
        return {"difference": None, "same_bits": None, "count": len(mine)}
    theirs = torch.load(path)
    squares = [(((mine[n].double() - g.double()) ** 2).sum(), (g.double() ** 2).sum()) for n, g in theirs.items()]
    far, whole = (float(sum(values)) for values in zip(*squares, strict=True))
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
    return {"difference": (far / whole) ** 0.5 if whole else None, "same_bits": same, "count": len(mine)}


def _static(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and optimizer state."""
    weights = [*module.parameters(), *module.buffers()]
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return sum(tensor.nbytes for tensor in (*weights, *state)) + gradients


def _told(step: Any) -> dict[str, Any]:
    """What the step tells of its plan and its last steps."""
    records = list(step.report().steps)[1 + _WARM :]
    return {
        "plan": step.plan.as_dict(),
        "measured_peak_bytes": max((r.measured_peak for r in records), default=None),
        "reported_reserved_bytes": max((r.reserved_peak for r in records), default=None),
        "offloaded_bytes": statistics.median(r.offloaded for r in records) if records else None,
        "repeated": sum(r.repeated for r in records),
    }
