"""Measure what a model costs on this machine: its computing with the reader idle and busy, and the storage."""

from __future__ import annotations

import logging
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
from narrowboat.machine.about import about
from narrowboat.machine.malloc import MallocPolicy, allocator_name, set_malloc_policy, trim
from narrowboat.machine.memory import memory_limits, process_memory, reset_peak, resident_bytes
from narrowboat.profile.measured import MeasuredProfile, save_profile
from narrowboat.profile.memory import guarded_floor
from narrowboat.report.curve import pareto
from narrowboat.stream.api import session, stream
from narrowboat.stream.prepare import Prepared
from narrowboat.stream.reader import PAGE, Extent, Reader, WeightsFile
from narrowboat.stream.session import Session
from narrowboat.trace import Trace

log = logging.getLogger("narrowboat")
_SETTLING = 3  # passes before what they take is believed
_PIECE = 4 << 20  # bytes of one read of the storage measurement
_SHARE = 0.8  # of the available memory
_FRUGAL = tuple(policy for policy in MallocPolicy if policy is not MallocPolicy.DEFAULT)
_PER_POLICY = 3  # passes, the first of them to settle
_TELLING = 2e-4  # seconds that a step takes at least, if it is to be told apart
_MOST_SLOWED = 2.0


def measure_profile(
    factory: Callable[[], nn.Module],
    weights: str | Path | WeightsIndex,
    inputs: tuple[Any, ...],
    *,
    passes: int = 4,
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
    total = _SETTLING + 2 * passes + len(_FRUGAL) * _PER_POLICY
    with session(model) as handle, torch.inference_mode():
        prepared = handle.prepared
        measured = prepared.measured
        if measured is None or prepared.trace is None:
            raise ModelError(
                f"a model that cannot be traced without running it has no profile: {prepared.why_untraced}"
            )
        done = 0

        def run() -> None:
            nonlocal done
            model(*inputs)
            done += 1
            progress(done, total)

        for _ in range(_SETTLING):
            run()
        trim()
        traced_here = max(resident_bytes() - handle.baseline - handle.plan.arena_bytes - prepared.at_rest, 0)
        counted = reset_peak() and handle.alone
        idle = _steps(handle, run, passes)
        measured.needs = {prepared.policy.value: _beside_weights(handle) - traced_here} if counted else {}
        measured.paces = {prepared.policy.value: sum(idle)}
        with _BusyReader(handle) as reader:
            busy = _steps(handle, run, passes)
        all_resident = not handle.plan.streamed
        measured.step_seconds, measured.policy = idle, prepared.policy.value
        measured.contention = max(sum(busy) / max(sum(idle), 1e-9) - 1, 0.0) if all_resident else None
        measured.slowed = _slowed(idle, busy) if all_resident else []
        measured.bandwidths = sorted(reader.bandwidths)
        measured.blocks = _blocks(prepared, idle, busy)
        if counted and prepared.policy is MallocPolicy.DEFAULT and allocator_name() == "glibc":
            _measure_frugal(handle, run, measured, traced_here)
        measured.about = about()
        measured.least = None  # what policies need has been measured since
        prepared.step_seconds, prepared.measured_under = tuple(idle), prepared.policy
        prepared.corrections.clear()
        if table:
            typical = statistics.median(measured.bandwidths) if measured.bandwidths else handle.machine.bandwidth
            measured.table = pareto(prepared, prepared.machine(typical)).to_json()
        refusal = save_profile(measured)
        if refusal:
            log.warning("the profile is not kept, and later sessions will not find it: %s", refusal)
    return measured


def _measure_frugal(handle: Session, run: Callable[[], Any], measured: MeasuredProfile, besides: int) -> None:
    """What passes take, in memory and in time, under the allocator policies that give memory back.

    Args:
        besides: bytes of the process that are no session's.
    """
    prepared = handle.prepared
    assert prepared.trace is not None
    tight = handle.plan.arena_bytes + sum(prepared.fixed_parts.values()) + guarded_floor(prepared.trace) + besides
    try:
        for policy in _FRUGAL:
            set_malloc_policy(policy)
            prepared.policy = policy
            handle.guard.allowed = tight
            run()
            reset_peak()
            seconds = sum(_steps(handle, run, _PER_POLICY - 1))
            measured.needs[policy.value] = _beside_weights(handle) - besides
            # Giving memory back makes nothing faster: what looks so is the machine's other work.
            measured.paces[policy.value] = max(seconds, measured.paces[MallocPolicy.DEFAULT.value])
    finally:
        prepared.policy, handle.guard.allowed = MallocPolicy.DEFAULT, None
        set_malloc_policy(MallocPolicy.DEFAULT)


def _beside_weights(handle: Session) -> int:
    """The most bytes that the process took over its baseline and the arena since the peak was last reset."""
    return max(process_memory().hwm - handle.baseline - handle.plan.arena_bytes, 0)


def _slowed(idle: list[float], busy: list[float]) -> list[float]:
    """By what factor each step takes longer beside reading; that of the pass for steps too short to tell."""
    overall = max(sum(busy) / max(sum(idle), 1e-9), 1.0)
    return [min(max(b / i, 1.0), _MOST_SLOWED) if i >= _TELLING else overall for i, b in zip(idle, busy, strict=True)]


def _steps(handle: Session, run: Callable[[], Any], passes: int) -> list[float]:
    """Median seconds of each step over some passes, waiting left out."""
    seen = []
    for _ in range(passes):
        run()
        seen.append(list(handle.records[-1].step_seconds))
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
