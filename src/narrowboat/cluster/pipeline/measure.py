"""How long each piece computes on this node: run once or twice with made-up weights, one piece in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from narrowboat.cluster.pipeline.part import Part
from narrowboat.cluster.pipeline.program import Facts, Program, Slot
from narrowboat.cluster.pipeline.survey import Model
from narrowboat.machine.storage_choice import load_storage_choice
from narrowboat.stream.probe import quick_bandwidth
from narrowboat.stream.reader import Reader, WeightsFile
from narrowboat.trace import Trace

_TIMES = 3  # runs of a piece, the first of which warms up


def bandwidth(model: Model) -> float:
    """Bytes per second of reading the weights file."""
    index = model.index
    files = [WeightsFile(path, stamp, direct=True) for path, stamp in zip(index.files, index.stamps, strict=True)]
    storage = load_storage_choice(index.files[0])
    reader = Reader(files, chunk=storage.chunk, workers=storage.depth, trace=Trace())
    try:
        return quick_bandwidth(reader, files)
    finally:
        reader.close()
        for file in files:
            file.close()


def piece_seconds(model: Model, budget: int) -> list[float]:
    """Seconds of computing of each piece, without reading; pieces that are alike are run once.

    Args:
        model: of ``survey.study``.
        budget: bytes; a piece that takes more is not run, and its estimate is corrected by what the others took.
    """
    known: dict[Any, float] = {}
    found: list[float | None] = []
    estimates = [sum(piece.workload.step_seconds) for piece in model.chain.pieces]
    for number, piece in enumerate(model.chain.pieces):
        begin, end = model.cuts[number], model.cuts[number + 1]
        if piece.workload.weight_bytes + piece.workload.fixed_bytes + piece.kept_bytes > budget:
            found.append(None)
            continue
        key = _likeness(model.program, model.skeleton, begin, end)
        if key not in known:
            known[key] = _run(Part(model.program, model.skeleton, begin, end), model.program)
        found.append(known[key])
    seen = [(took, guess) for took, guess in zip(found, estimates, strict=True) if took is not None]
    off = sum(took for took, _ in seen) / max(sum(guess for _, guess in seen), 1e-9) if seen else 1.0
    return [guess * off if took is None else took for took, guess in zip(found, estimates, strict=True)]


def _run(part: Part, program: Program) -> float:
    inputs = [_made_up(program.facts[slot]) for slot in part.takes]
    best = float("inf")
    with _materialised(part), torch.inference_mode():
        for _ in range(_TIMES):
            fresh = [tensor.clone() for tensor in inputs]
            start = time.perf_counter()
            part(*fresh)
            best = min(best, time.perf_counter() - start)
    return best


@contextmanager
def _materialised(part: nn.Module) -> Iterator[None]:
    """Every weight that has no bytes is given some, and loses them again."""
    made: dict[int, torch.Tensor] = {}
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for child in part.modules():
            tables: tuple[Any, ...] = (child._parameters, child._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None or not tensor.is_meta:
                        continue
                    if id(tensor) not in made:
                        value = _made_up(Facts(tuple(tensor.shape), tensor.dtype, 0, 0, 0), tensor.stride())
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = (
                            nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
                        )
                    places.append((table, name, tensor))
                    table[name] = made[id(tensor)]
        yield
    finally:
        for table, name, tensor in places:
            table[name] = tensor


def _made_up(facts: Facts, stride: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor of that shape: a small number, the first row of any table, or True."""
    value: Any = 0.01 if facts.dtype.is_floating_point or facts.dtype.is_complex else facts.dtype is torch.bool
    if stride is None:
        return torch.full(facts.shape, value, dtype=facts.dtype)
    return torch.empty_strided(facts.shape, stride, dtype=facts.dtype).fill_(value)


def _likeness(program: Program, model: nn.Module, begin: int, end: int) -> Any:
    """What pieces that take the same time have in common."""
    told: list[Any] = []
    for instruction in program.instructions[begin:end]:
        shapes = tuple(
            (program.facts[v.number].shape, program.facts[v.number].dtype) if isinstance(v, Slot) else type(v)
            for v in instruction.arguments
        )
        if instruction.is_module:
            child = model.get_submodule(instruction.target)
            weights = tuple((tuple(p.shape), p.dtype) for p in (*child.parameters(), *child.buffers()))
            told.append((type(child), weights, shapes))
        else:
            told.append((instruction.target, shapes))
    return tuple(told)
