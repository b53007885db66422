"""What a budget would give, without running the model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from narrowboat.arena.slab import Slab
from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import UsageError
from narrowboat.machine.storage_choice import StorageChoice
from narrowboat.plan.advice import advise
from narrowboat.plan.result import Plan
from narrowboat.plan.schemes import check_names
from narrowboat.profile.warmup import warm_up
from narrowboat.report.curve import smallest_budget
from narrowboat.stream.prepare import Prepared, prepare
from narrowboat.stream.reader import PAGE, Extent, Reader, WeightsFile
from narrowboat.stream.tiling import fit
from narrowboat.trace import Trace

_SAMPLE = 32 << 20  # bytes read to measure the storage
_TOO_SMALL = 1 << 20  # a file below this says nothing about the storage


@dataclass(frozen=True)
class Forecast:
    """A plan that was made and not run.

    Attributes:
        plan: the plan.
        prepared: the model matched with its weights, and traced.
        measured: whether the storage was measured; else its bandwidth was given, or assumed for a tiny file.
    """

    plan: Plan
    prepared: Prepared
    measured: bool

    def advice(self) -> list[str]:
        """What would shorten a pass most, in sentences."""
        prepared, before = self.prepared, self.prepared.policy
        try:
            return advise(self.plan, prepared.enough(), lambda budget, on: prepared.choose(on, budget)[0])
        finally:
            prepared.policy = before

    def blocks(self) -> list[dict[str, Any]]:
        """Per block, in order of first use: name, bytes, where it lives, the steps that hold it, predicted stall."""
        plan = self.plan
        return [
            {
                "name": block.name,
                "bytes": block.nbytes,
                "read_bytes": block.read_bytes,
                "resident": number in plan.resident,
                "offset": plan.offsets[number],
                "holds": [list(hold) for hold in block.holds],
                "predicted_stall_ms": plan.timing.stall_by_block.get(number, 0.0) * 1e3,
            }
            for number, block in enumerate(plan.blocks)
        ]


def foresee(
    model: Callable[[], nn.Module] | nn.Module,
    weights: str | Path | WeightsIndex,
    *,
    budget: int | None,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    bandwidth: float | None = None,
    strict: bool = True,
    scheme: str = "best",
    objective: str = "throughput",
    profile: Path | None = None,
    target: float | None = None,
) -> Forecast:
    """Plan ``model`` for ``budget`` bytes; the module is not touched and nothing but a sample of the file is read.

    Args:
        model: factory or module.
        weights: a weights file or folder, or the index of one.
        budget: bytes over the process baseline; None finds the smallest for ``target``.
        target: seconds per pass.
        example: ``(args, kwargs)`` of one pass, or None.
        bandwidth: bytes per second of the storage; None measures it.
        strict: refuse tensors in the file that the model does not have.
        scheme: how to plan: ``"best"``, or one of ``plan.schemes`` for comparison.
        objective: as for ``nb.stream``.
        profile: a file of ``narrowboat profile`` to plan from; None takes what is kept of earlier runs.

    Raises:
        UsageError: no budget is enough for the target, or none of the two is given.
        ProfileError: the profile is of another model or machine.
        BudgetError: the budget cannot hold the model.
        UsageError: no such scheme or objective.
        WeightsError, ModelError: as ``nb.stream``.
    """
    warm_up()
    prepared = prepare(model, weights, example, strict=strict)
    if profile is not None:
        prepared.take(profile)
    if budget is None and target is None:
        raise UsageError("give a budget or a target latency")
    measured = None
    check_names(scheme, objective)
    prepared.scheme, prepared.objective = scheme, objective
    # What cannot hold is refused before anything is read.
    prepared = fit(prepared, budget if budget is not None else prepared.enough())
    if bandwidth is None:
        measured = read_bandwidth(prepared.index, prepared.storage)
    machine = prepared.machine(bandwidth or measured or 1e9)
    if budget is None:
        assert target is not None
        budget = smallest_budget(prepared, machine, target).budget
    plan, _ = prepared.choose(machine, budget, thorough=True)
    return Forecast(plan, prepared, measured is not None)


def read_bandwidth(index: WeightsIndex, storage: StorageChoice) -> float | None:
    """Bytes per second of reading some of the weights as a session would; None if there are too few of them."""
    number = max(range(len(index.files)), key=lambda i: index.stamps[i].size)
    nbytes = min(_SAMPLE, index.stamps[number].size // PAGE * PAGE)
    if nbytes < _TOO_SMALL:
        return None
    files = [WeightsFile(path, stamp, direct=True) for path, stamp in zip(index.files, index.stamps, strict=True)]
    reader = Reader(files, chunk=storage.chunk, workers=storage.depth, trace=Trace())
    scratch = Slab(nbytes)
    try:
        start = time.perf_counter()
        job = reader.submit("probe", scratch, [Extent(number, 0, nbytes, 0)])
        reader.wait(job)
        return nbytes / (time.perf_counter() - start)
    finally:
        reader.drain()
        reader.close()
        scratch.close()
        for file in files:
            file.close()
