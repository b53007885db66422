"""Measure what a model costs on this machine: its computing with the reader idle and busy, and the storage."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.arena.slab import Slab
from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import ModelError
from narrowboat.machine.memory import memory_limits
from narrowboat.profile.measured import MeasuredProfile, save_profile
from narrowboat.report.curve import pareto
from narrowboat.stream.api import session, stream
from narrowboat.stream.prepare import Prepared
from narrowboat.stream.reader import PAGE, Extent, Reader, WeightsFile
from narrowboat.stream.session import Session
from narrowboat.trace import Trace

_SETTLING = 3  # passes before what they take is believed
_PIECE = 4 << 20  # bytes of one read of the storage measurement
_SHARE = 0.8  # of the available memory


def measure_profile(
    factory: Callable[[], nn.Module],
    weights: str | Path | WeightsIndex,
    inputs: tuple[Any, ...],
    *,
    passes: int = 5,
    table: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MeasuredProfile:
    """Run the model with as much of it in memory as there is room for, alone and beside a busy reader.

    The result is kept in the user's cache folder, where sessions of the same model find it.

    Args:
        factory: makes the module.
        weights: a weights file or folder, or the index of one.
        inputs: positional arguments of a pass.
        passes: how many are measured of each kind; their median counts.
        table: also make the lookup table of plans.
        progress: called with (passes done, passes in all).

    Raises:
        ModelError: the model cannot be traced without running it, so that a profile cannot be told from another.
        NarrowboatError: as ``nb.stream``.
    """
    budget = int(memory_limits().available * _SHARE)
    model = stream(factory, weights, budget=budget, example=inputs)
    total = _SETTLING + 2 * passes
    with session(model) as handle, torch.inference_mode():
        prepared = handle.prepared
        measured = prepared.measured
        if measured is None or prepared.trace is None:
            raise ModelError(
                f"a model that cannot be traced without running it has no profile: {prepared.why_untraced}"
            )
        for done in range(_SETTLING):
            model(*inputs)
            progress(done + 1, total)
        idle = _steps(handle, lambda: model(*inputs), passes, lambda n: progress(_SETTLING + n, total))
        with _BusyReader(handle) as reader:
            busy = _steps(handle, lambda: model(*inputs), passes, lambda n: progress(_SETTLING + passes + n, total))
        measured.step_seconds, measured.policy = idle, prepared.policy.value
        measured.contention = 0.0 if handle.plan.streamed else max(sum(busy) / max(sum(idle), 1e-9) - 1, 0.0)
        measured.bandwidths = sorted(reader.bandwidths)
        measured.blocks = _blocks(prepared, idle, busy)
        prepared.step_seconds, prepared.measured_under = tuple(idle), prepared.policy
        prepared.corrections.clear()
        if table:
            typical = statistics.median(measured.bandwidths) if measured.bandwidths else handle.machine.bandwidth
            machine = type(handle.machine)(bandwidth=typical, contention=measured.contention)
            measured.table = pareto(prepared, machine).to_json()
        save_profile(measured)
    return measured


def _steps(handle: Session, run: Callable[[], Any], passes: int, progress: Callable[[int], None]) -> list[float]:
    """Median seconds of each step over some passes, waiting left out."""
    seen = []
    for number in range(passes):
        run()
        seen.append(list(handle.records[-1].step_seconds))
        progress(number + 1)
    return [statistics.median(of_step) for of_step in zip(*seen, strict=True)]


class _BusyReader:
    """Reads the weights over and over beside whatever else goes on; notes how fast each read was."""

    def __init__(self, handle: Session) -> None:
        index, storage = handle.prepared.index, handle.prepared.storage
        pairs = zip(index.files, index.stamps, strict=True)
        self._files = [WeightsFile(path, stamp, direct=True) for path, stamp in pairs]
        self._reader = Reader(self._files, chunk=storage.chunk, workers=storage.depth, trace=Trace())
        self._scratch = Slab(_PIECE)
        self._stop = threading.Event()
        self._number = max(range(len(self._files)), key=lambda i: self._files[i].stamp.size)
        self._thread = threading.Thread(target=self._read, name="narrowboat-profile-reader", daemon=True)
        self.bandwidths: list[float] = []

    def _read(self) -> None:
        size = self._files[self._number].stamp.size // PAGE * PAGE
        piece = min(_PIECE, size)
        at = 0
        while piece and not self._stop.is_set():
            if at + piece > size:
                at = 0
            job = self._reader.submit("profile", self._scratch, [Extent(self._number, at, piece, 0)])
            self._reader.wait(job)
            if job.finished > job.started:
                self.bandwidths.append(piece / (job.finished - job.started))
            at += piece

    def __enter__(self) -> _BusyReader:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._reader.drain()
        self._reader.close()
        self._scratch.close()
        for file in self._files:
            file.close()


def _blocks(prepared: Prepared, idle: list[float], busy: list[float]) -> list[dict[str, Any]]:
    workload, _ = prepared.workload()
    alive = prepared.trace.peaks if prepared.trace is not None else []
    rows = []
    for block in workload.blocks:
        steps = [step for first, last in block.holds for step in range(first, last + 1)]
        rows.append(
            {
                "name": block.name,
                "bytes": block.nbytes,
                "read_bytes": block.read_bytes,
                "uses": len(block.holds),
                "compute_idle_ms": sum(idle[s] for s in steps) * 1e3,
                "compute_busy_ms": sum(busy[s] for s in steps) * 1e3,
                "activation_bytes": max((alive[s] for s in steps if s < len(alive)), default=0),
            }
        )
    return rows
