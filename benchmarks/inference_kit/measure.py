"""What a child process does: warm up, a cold first answer, passes back to back, memory, and the output's digest."""

from __future__ import annotations

import gc
import hashlib
import mmap
import os
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

import narrowboat as nb
import narrowboat.stream.api
from inference_kit.children import Emit
from inference_kit.materials import Material
from inference_kit.subjects import SUBJECTS
from narrowboat.errors import BudgetError
from narrowboat.machine.cgroup import MemoryCgroup
from narrowboat.machine.malloc import set_malloc_policy
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.profile.warmup import warm_up

_CHUNK = 2 << 20
_THREADS = 2
_READ_AT_MOST = 768 << 20
_SETTLING = 3  # first passes that do not count: the planner moves once after two


def run_subject(emit: Emit, name: str, files: Material, budget: int, passes: int, seconds: float) -> None:
    """Run one subject.

    Events: ``first`` (seconds from a warm process to the first answer, digest), ``pass`` (seconds), ``end``.

    Args:
        emit: takes the events.
        name: the subject.
        files: model and weights.
        budget: bytes above the process baseline.
        passes: at most so many after the first.
        seconds: no further pass is begun so many seconds after the first answer.
    """
    subject = SUBJECTS[name]
    inputs = files.model.example_inputs()
    warm_up()
    with torch.device("meta"):
        files.model()  # imports the model's code: that is the process's, whoever runs it
    if not subject.ours:
        set_malloc_policy(subject.policy)
    gc.collect()
    reset_peak()
    baseline = process_memory().rss
    start = time.perf_counter()
    running = subject.load(files, budget)
    with torch.inference_mode():
        output = running.module(*inputs)
        emit("first", seconds=time.perf_counter() - start, peak=process_memory().hwm - baseline)
        digest = digest_of(output)
        emit("output", digest=digest)
    if name == "resident":
        running.after_first()
    with torch.inference_mode():
        if name == "resident":
            output = running.module(*inputs)  # the mapping is not aligned as memory is: last bits may differ
            digest = digest_of(output)
            emit("output", digest=digest)
        del output
        began = time.perf_counter()
        last = None
        for _ in range(passes):
            del last  # an answer of the benchmark's own is not the subject's
            t = time.perf_counter()
            last = running.module(*inputs)
            now = time.perf_counter()
            emit("pass", seconds=now - t, peak=process_memory().hwm - baseline)
            if now - began > seconds:
                break
    emit("output", digest=digest_of(last))
    emit("end", peak=process_memory().hwm - baseline, baseline=baseline, stats=running.stats())
    _keep(kept_output(files, name), last)


def kept_output(files: Material, name: str) -> Path:
    """Where a subject's output is kept; plain PyTorch's is the reference."""
    return files.reference if name == "resident" else files.reference.with_suffix(f".{name}.npy")


def steady(pass_seconds: list[float]) -> float | None:
    """The child's steady latency: the median without the first passes, in which planner and caches settle."""
    kept = pass_seconds[min(_SETTLING, len(pass_seconds) // 2) :]
    return statistics.median(kept) if kept else None


def find_minimum(emit: Emit, files: Material) -> None:
    """The smallest budget for the packed file."""
    try:
        nb.stream(files.model, files.packed, budget=1)
    except BudgetError as error:
        emit("minimum", bytes=error.minimum, limiter=error.limiter)


def find_baseline(emit: Emit, group: MemoryCgroup | None) -> None:
    """What a process holds before it has a model: what its cgroup is charged, and its resident memory."""
    warm_up()
    gc.collect()
    emit("baseline", charged=group.current() if group is not None else 0, rss=process_memory().rss)


def read_directly(emit: Emit, path: Path) -> None:
    """Bytes per second of reading ``path`` past the page cache, two threads of 2 MiB reads, nothing else running."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    total = min(os.fstat(fd).st_size, _READ_AT_MOST) // _CHUNK * _CHUNK
    read = [0] * _THREADS

    def work(number: int) -> None:
        buffer = mmap.mmap(-1, _CHUNK)
        for at in range(number * _CHUNK, total, _THREADS * _CHUNK):
            read[number] += os.preadv(fd, [buffer], at)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(_THREADS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    emit("bandwidth", bytes_per_s=sum(read) / (time.perf_counter() - start), bytes=sum(read))
    os.close(fd)


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def digest_of(output: Any) -> str:
    """Of the bytes of every tensor of an output."""
    sha = hashlib.sha256()
    for tensor in _tensors(output):
        sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _keep(path: Path, output: Any) -> None:
    np.save(path, np.concatenate([tensor.float().flatten().numpy() for tensor in _tensors(output)]))


def difference(path: Path, reference: Path) -> float | None:
    """Largest absolute difference of two kept outputs, relative to the reference's largest value."""
    if not path.exists() or not reference.exists():
        return None
    got, want = np.load(path), np.load(reference)
    if got.shape != want.shape:
        return float("inf")
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
