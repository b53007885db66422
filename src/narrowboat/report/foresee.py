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
from narrowboat.machine.storage_choice import StorageChoice
from narrowboat.plan.model import Machine
from narrowboat.plan.result import Plan
from narrowboat.profile.warmup import warm_up
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
    weights: str | Path,
    *,
    budget: int,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    bandwidth: float | None = None,
    strict: bool = True,
    scheme: str = "best",
) -> Forecast:
    """Plan ``model`` for ``budget`` bytes; the module is not touched and nothing but a sample of the file is read.

    Args:
        model: factory or module.
        weights: a weights file or folder.
        budget: bytes over the process baseline.
        example: ``(args, kwargs)`` of one pass, or None.
        bandwidth: bytes per second of the storage; None measures it.
        strict: refuse tensors in the file that the model does not have.
        scheme: how to plan: ``"best"``, or one of ``plan.schemes`` for comparison.

    Raises:
        BudgetError: the budget cannot hold the model.
        UsageError: no such scheme.
        WeightsError, ModelError: as ``nb.stream``.
    """
    warm_up()
    prepared = prepare(model, weights, example, strict=strict)
    measured = None
    prepared.scheme = scheme
    prepared = fit(prepared, budget)  # what cannot hold is refused before anything is read
    if bandwidth is None:
        measured = read_bandwidth(prepared.index, prepared.storage)
    plan, _ = prepared.choose(Machine(bandwidth=bandwidth or measured or 1e9), budget, thorough=True)
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
