"""What a child process does: check one step under the meters, or time steps, or ask for the smallest budget."""

from __future__ import annotations

import gc
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from inference_kit.children import Emit
from narrowboat.errors import BudgetError
from narrowboat.machine.malloc import set_malloc_policy
from narrowboat.machine.memory import process_memory, reset_peak
from narrowboat.profile.warmup import warm_up
from training_kit.measure import (
    GradientWatch,
    LiveStorages,
    allocator_ledger,
    digest,
    held_bytes,
    state_tensors,
    static_bytes,
    unlimited,
)
from training_kit.models import WORKLOADS, Batch
from training_kit.subjects import SUBJECTS, Job, Running, Setting


@dataclass(frozen=True, slots=True)
class Order:
    """What a child is told.

    Attributes:
        model: a key of the workloads.
        batch: samples of a step.
        setting: subject and knobs.
        threads: of PyTorch.
        work: folder for what the child writes.
        exact: compare gradients in float64 and without dropout.
    """

    model: str
    batch: int
    setting: Setting
    threads: int
    work: Path
    exact: bool = False

    @property
    def reference(self) -> Path:
        """Folder of the plain step's gradients."""
        return self.work / f"{self.model}-gradients-{'float64' if self.exact else 'float32'}"

    def data(self) -> Batch:
        """Inputs and targets."""
        inputs, targets = WORKLOADS[self.model].data(self.batch)
        return (inputs.double() if self.exact and inputs.is_floating_point() else inputs), targets

    def prepare(self) -> tuple[Job, Running]:
        """Module, optimizer and step."""
        workload = WORKLOADS[self.model]
        module = workload.build(self.exact)
        optimizer = workload.optimizer(module.parameters())
        job = Job(workload, module, optimizer, self.batch, self.setting, self.work / "spill")
        return job, SUBJECTS[self.setting.subject].prepare(job)


def check(order: Order, emit: Emit) -> None:
    """Three steps: gradients of the first; live storages in the second; the allocator's blocks in the third.

    Events: ``exact`` (digests and distance from plain), ``storages`` and ``allocator`` (peaks in bytes), ``static``.
    """
    subject = SUBJECTS[order.setting.subject]
    _become(order)
    inputs, targets = order.data()
    live = LiveStorages() if subject.eager else None
    meter: AbstractContextManager[Any] = live if live is not None else nullcontext()
    with meter:
        job, running = order.prepare()
        watch = GradientWatch(job.module, job.optimizer, order.reference, write=order.setting.subject == "plain")
        watch.live = live
        torch.manual_seed(2)
        running.step(inputs, targets)
        emit(
            "exact",
            parameters=digest(job.module.parameters()),
            buffers=digest(job.module.buffers()),
            random=digest([torch.get_rng_state()]),
            **watch.told(),
        )
        if order.exact:
            return
        if live is not None:
            with unlimited():
                since = live.ledger.position()
                running.step(inputs, targets)
            live.keep([*job.module.parameters(), *job.module.buffers(), *state_tensors(job.optimizer)])
            ledger = live.ledger
            emit(
                "storages",
                peak=ledger.peak(since),
                activations=ledger.peak(since, kept=False),
                half=ledger.peak(since, share=0.5),
                first=ledger.peak(),
            )
    watch.live = None
    watch.places.clear()
    emit("static", **asdict(static_bytes(job.module, job.optimizer)))
    # The profiler does not hear of the end of blocks that it did not see begin.
    job.optimizer.zero_grad(set_to_none=True)
    start = held_bytes(job.module, job.optimizer)
    with unlimited():
        ledger = allocator_ledger(lambda: running.step(inputs, targets), watch, start)
    emit("allocator", peak=ledger.peak(), activations=ledger.peak(kept=False))
    emit("told", **running.told())


def timed(order: Order, steps: int, settling: int, emit: Emit) -> None:
    """Events: ``first`` (making the step and taking it once), ``step`` for each further one, ``end`` (memory)."""
    _become(order)
    inputs, targets = order.data()
    gc.collect()
    baseline = process_memory().rss
    start = time.perf_counter()
    _, running = order.prepare()
    prepared = time.perf_counter()
    reset_peak()
    running.step(inputs, targets)
    emit(
        "first",
        prepare=prepared - start,
        seconds=time.perf_counter() - prepared,
        rss_peak=process_memory().hwm - baseline,
    )
    for _ in range(settling):
        running.step(inputs, targets)
    reset_peak()
    for _ in range(steps):
        start, cpu = time.perf_counter(), time.process_time()
        running.step(inputs, targets)
        emit("step", seconds=time.perf_counter() - start, cpu=time.process_time() - cpu)
    emit("end", rss_peak=process_memory().hwm - baseline, told=running.told())


def minimum(order: Order, emit: Emit) -> None:
    """Event ``minimum``: the smallest budget and what sets it, as the refusal of one byte tells them."""
    _become(order)
    inputs, targets = order.data()
    try:
        _, running = order.prepare()
        running.step(inputs, targets)
    except BudgetError as error:
        emit("minimum", bytes=error.minimum, limiter=error.limiter)


def _become(order: Order) -> None:
    """A process that has loaded what PyTorch loads late, whatever the subject."""
    torch.set_num_threads(order.threads)
    warm_up()
    warm = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
    torch.nn.functional.cross_entropy(warm(torch.zeros(2, 3, 8, 8)), torch.zeros(2, dtype=torch.long)).backward()
    subject = SUBJECTS[order.setting.subject]
    if not subject.ours:
        set_malloc_policy(subject.policy)
