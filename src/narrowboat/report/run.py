"""Run a streamed model some passes, measure it from outside, and compare it with plain PyTorch."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from narrowboat.checkpoint import WeightsIndex, open_index
from narrowboat.errors import UsageError
from narrowboat.machine.about import about
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.profile.warmup import warm_up
from narrowboat.report.block_times import BlockTimes
from narrowboat.report.exact import first_difference, output_digest, output_tensors
from narrowboat.report.memory_samples import MemorySamples
from narrowboat.report.picture import require_matplotlib
from narrowboat.report.plain import load_weights
from narrowboat.report.timeline import draw_timeline
from narrowboat.stream.api import session, stream
from narrowboat.stream.tiers import Budget


@dataclass(frozen=True)
class RunReport:
    """What a run measured; the names and units are those of ``narrowboat run --json``.

    Attributes:
        latency_ms: per pass.
        predicted_latency_ms: of the plan in force at the end.
        stall_ms: per pass, waiting for weights.
        bytes_read: per pass, from storage.
        budget_bytes, min_budget_bytes: the budget, and the smallest that would do.
        peak_bytes: most resident memory over the process baseline, by the kernel's high-water mark.
        bit_identical: whether the outputs are plain PyTorch's, bit by bit; None if it was not asked.
        direct_io: the page cache was not used.
        first_answer_ms: from the model's name to its first output.
        weight_bytes, resident_bytes, window_bytes: all weights; those that stay in; the arena the others share.
        fixed_parts: bytes the budget pays besides weights, by name.
        allocator_policy: how malloc treated freed activations.
        tiled_layers: by layer too large to be in as a whole: in how many pieces it was computed; 0 for a table whose
            rows were read on demand.
        copied_bytes: read bytes that needed a copy, because the file is not packed.
        device: where it ran.
        pinned_bytes, host_cache_bytes: on a device: pinned host memory, and the part of it that keeps weights.
        copy_bytes_per_s: from there to the device.
        output_digest: sha256 of the last output.
        difference: where the outputs differ, in words.
        predicted_ms: per pass, of the plan in force when it ended.
        predicted_stall_ms, predicted_bytes_read, bound_ms: of the plan in force at the end: waiting and reads of a
            pass, and what no plan within the budget can beat.
        blocks: per block, predicted and measured (``BlockTimes.rows``).
        memory: ``(seconds since the first pass began, bytes over the process baseline)``, seen now and then; empty on
            a device.
    """

    latency_ms: list[float]
    predicted_latency_ms: float
    stall_ms: list[float]
    bytes_read: list[int]
    budget_bytes: int
    min_budget_bytes: int
    peak_bytes: int
    bit_identical: bool | None
    direct_io: bool
    first_answer_ms: float
    weight_bytes: int
    resident_bytes: int
    window_bytes: int
    fixed_parts: dict[str, int]
    allocator_policy: str
    tiled_layers: dict[str, int]
    copied_bytes: int
    device: str
    pinned_bytes: int
    host_cache_bytes: int
    copy_bytes_per_s: float
    output_digest: str
    difference: str
    predicted_ms: list[float] = field(default_factory=list)
    predicted_stall_ms: float = 0.0
    predicted_bytes_read: int = 0
    bound_ms: float = 0.0
    blocks: list[dict[str, Any]] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)


@dataclass(frozen=True)
class RunOutputs:
    """Where to put what a run leaves behind; each may be None.

    Attributes:
        trace: Chrome/Perfetto JSON of the last two passes.
        timeline: the same as a PNG.
        output: ``.npy`` of the output, which must then be one tensor.
    """

    trace: Path | None = None
    timeline: Path | None = None
    output: Path | None = None

    def check(self) -> None:
        """Refuse before the run what could not be written after it.

        Raises:
            UsageError: a folder is missing, a name does not fit, or matplotlib is not installed.
        """
        for path in (self.trace, self.timeline, self.output):
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise UsageError(f"cannot write {path}: there is no folder {path.parent}, or it is a folder itself")
        if self.output is not None and self.output.suffix != ".npy":
            raise UsageError(f"--output {self.output}: give a name that ends in .npy")
        if self.timeline is not None:
            require_matplotlib()


def run_model(
    factory: Callable[[], nn.Module],
    weights: str | Path | WeightsIndex,
    *,
    budget: Budget,
    inputs: tuple[Any, ...],
    device: str = "cpu",
    passes: int = 5,
    io: str = "auto",
    verify: bool = False,
    outputs: RunOutputs | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RunReport:
    """Stream the model, run ``passes`` passes under ``torch.inference_mode``, and report.

    The peak is taken from a high-water mark that is reset before the model is streamed and read before plain
    PyTorch is loaded for ``verify``.

    Args:
        factory: makes the module.
        weights: a weights file or folder, or the index of one.
        budget: bytes over the process baseline, or of the device; as for ``nb.stream``.
        inputs: positional arguments of a pass.
        device: as for ``nb.stream``.
        passes: how many; at least one.
        io: ``"auto"``, ``"direct"`` or ``"buffered"``.
        verify: compare the output of every pass with plain PyTorch's, all tensors, bit by bit.
        outputs: files to write.
        progress: called with (passes done, passes in all).

    Raises:
        UsageError: ``passes`` below one, no tensor in the output to compare or to save, or a bad file name.
        NarrowboatError: as ``nb.stream``.
    """
    if passes < 1:
        raise UsageError(f"passes must be at least 1, not {passes}")
    wanted = outputs if outputs is not None else RunOutputs()
    wanted.check()
    warm_up()
    gc.collect()
    reset_peak()
    begun = time.perf_counter()
    model = stream(factory, weights, budget=budget, example=inputs, io=io, device=device)
    handle = session(model)
    place = handle.ground.torch_device
    inputs = tuple(value.to(place) if isinstance(value, torch.Tensor) else value for value in inputs)
    output: Any = None
    first_answer = 0.0
    starts: list[float] = []
    digests: list[str] = []
    measured: dict[str, list[Any]] = {"latency_ms": [], "stall_ms": [], "bytes_read": []}
    predicted: list[float] = []
    times = BlockTimes(handle)
    samples = MemorySamples(baseline=handle.baseline)
    try:
        with torch.inference_mode(), samples:
            for number in range(passes):
                output = None  # two outputs are never held at once
                torch.manual_seed(0)
                starts.append(time.perf_counter())
                output = model(*inputs)
                first_answer = first_answer or time.perf_counter() - begun
                if verify:
                    digests.append(output_digest(output))
                # The session keeps the last passes only; here every one counts.
                stats = handle.stats()
                for key, values in measured.items():
                    values.append(stats[key][-1])
                predicted.append(stats["predicted_latency_ms"])
                times.note(handle.records[-1])
                progress(number + 1, passes)
        peak = process_memory().hwm
        stats = handle.stats()
        blocks, reads = times.rows(), handle.plan.timing.bytes_read
        ours = [tensor.to("cpu", copy=True) for tensor in output_tensors(output)]
    finally:
        handle.close()
    digest = output_digest(ours)
    del output, model
    since = starts[max(len(starts) - 2, 0)]
    if wanted.trace is not None:
        handle.trace().save_chrome(wanted.trace, since, about())
    if wanted.timeline is not None:
        name = weights.files[0].parent.name if isinstance(weights, WeightsIndex) else Path(weights).name
        draw_timeline(handle.trace(), wanted.timeline, since, title=f"{name}: the last passes")
    if wanted.output is not None:
        _save_output(ours, wanted.output)
    difference = _compare(factory, weights, inputs, ours, digests, place) if verify else ""
    return RunReport(
        latency_ms=measured["latency_ms"],
        predicted_latency_ms=stats["predicted_latency_ms"],
        stall_ms=measured["stall_ms"],
        bytes_read=measured["bytes_read"],
        budget_bytes=stats["budget_bytes"],
        min_budget_bytes=stats["min_budget_bytes"],
        peak_bytes=max(peak - stats["baseline_bytes"], 0) if stats["device"] == "cpu" else stats["peak_bytes"],
        bit_identical=not difference if verify else None,
        direct_io=stats["direct_io"],
        first_answer_ms=first_answer * 1e3,
        weight_bytes=stats["weight_bytes"],
        resident_bytes=stats["resident_bytes"],
        window_bytes=stats["window_bytes"],
        fixed_parts=stats["fixed_parts"],
        allocator_policy=stats["allocator_policy"],
        tiled_layers=stats["tiled_layers"],
        copied_bytes=stats["copied_bytes"],
        device=stats["device"],
        pinned_bytes=stats["pinned_bytes"],
        host_cache_bytes=stats["host_cache_bytes"],
        copy_bytes_per_s=stats["copy_bytes_per_s"],
        output_digest=digest,
        difference=difference,
        predicted_ms=predicted,
        predicted_stall_ms=stats["predicted_stall_ms"],
        predicted_bytes_read=reads,
        bound_ms=stats["bound_ms"],
        blocks=blocks,
        memory=samples.points if stats["device"] == "cpu" else [],
    )


def _compare(
    factory: Callable[[], nn.Module],
    weights: str | Path | WeightsIndex,
    inputs: tuple[Any, ...],
    ours: list[torch.Tensor],
    digests: list[str],
    place: torch.device,
) -> str:
    """Where the outputs differ from plain PyTorch's, in words; empty if nowhere."""
    if not ours:
        raise UsageError("there is no tensor in the model's output: nothing to verify")
    plain = factory()
    load_weights(plain, weights if isinstance(weights, WeightsIndex) else open_index(weights))
    plain.to(place)
    # A model without state gives the same answer every time: one plain pass then stands for all.
    steady = len(set(digests)) == 1
    difference = ""
    with torch.inference_mode():
        for number, digest in enumerate(digests[-1:] if steady else digests):
            torch.manual_seed(0)
            theirs = plain(*inputs)
            if digest != output_digest(theirs) and not difference:
                last = steady or number == len(digests) - 1
                words = first_difference(ours, [t.cpu() for t in output_tensors(theirs)]) if last else ""
                difference = words or f"the output of pass {number + 1} differs"
    return difference


def _save_output(tensors: list[torch.Tensor], path: Path) -> None:
    if len(tensors) != 1:
        raise UsageError(f"--output takes a model with one output tensor; this one has {len(tensors)}")
    tensor = tensors[0].detach()
    try:
        array = tensor.numpy()
    except TypeError:  # bfloat16 and the eight-bit floats: numpy has no such type, and float32 holds them exactly
        array = tensor.to(torch.float32).numpy()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            numpy.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
