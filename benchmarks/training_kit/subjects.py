"""What is compared: for each subject, how a model, its loss and its optimizer become one training step."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import find_executable_batch_size
from torch import nn
from torch.utils.checkpoint import checkpoint

import narrowboat as nb
from narrowboat.machine.malloc import MallocPolicy
from narrowboat.machine.memory import process_memory
from training_kit.models import Workload

_MARGIN = 64 << 20  # of the data limit: stacks, the interpreter, holes of the heap

Step = Callable[[torch.Tensor, torch.Tensor], Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """A subject with its knobs; what one child process runs.

    Attributes:
        subject: a key of :data:`SUBJECTS`.
        micro: samples of a micro-batch; None for the whole batch at once.
        ratio: torch.compile's ``activation_memory_budget``.
        budget: bytes above the process baseline.
        asked: how the budget was chosen, in words for tables: ``"50 %"``, ``"minimum"``.
        techniques: the only techniques narrowboat may use; None for all.
    """

    subject: str
    micro: int | None = None
    ratio: float | None = None
    budget: int | None = None
    asked: str = ""
    techniques: tuple[str, ...] | None = None

    @property
    def key(self) -> str:
        """A name of its own, fit for files."""
        parts = [self.subject]
        parts += [f"micro{self.micro}"] if self.micro else []
        parts += [f"ratio{self.ratio:g}"] if self.ratio is not None else []
        parts += [f"budget{self.budget}"] if self.budget is not None else []
        parts += ["only-" + "-".join(self.techniques or ("none",))] if self.techniques is not None else []
        return "_".join(parts)

    @property
    def label(self) -> str:
        """What the knobs say, for tables."""
        parts = [f"micro-batch {self.micro}"] if self.micro else []
        parts += [f"ratio {self.ratio:g}"] if self.ratio is not None else []
        parts += [self.asked] if self.asked else []
        return ", ".join(parts) or "-"


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a subject makes its step of.

    Attributes:
        workload: where the module came from.
        module: in training mode.
        optimizer: over the module's parameters.
        batch: samples of a step.
        setting: the knobs.
        spill: a folder for whoever spills.
    """

    workload: Workload
    module: nn.Module
    optimizer: torch.optim.Optimizer
    batch: int
    setting: Setting
    spill: Path


@dataclass(slots=True)
class Running:
    """A step that can be called, and what the subject itself has to tell at the end."""

    step: Step
    told: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True, slots=True)
class Subject:
    """One way to train.

    Attributes:
        label: its name in tables.
        prepare: makes the step.
        eager: every tensor comes from an operator, so that :class:`~training_kit.measure.LiveStorages` sees it.
        ours: it is narrowboat.
        static: of no more than PyTorch's recompute and a loop: what narrowboat must never be slower than.
        note: what a reader of the tables must know.
        policy: the allocator's; narrowboat chooses its own.
    """

    label: str
    prepare: Callable[[Job], Running]
    eager: bool = True
    ours: bool = False
    static: bool = False
    note: str = ""
    policy: MallocPolicy = MallocPolicy.DEFAULT


def _accumulating(job: Job, forward: Callable[..., Any], micro: int) -> Step:
    """zero_grad; forward and backward of each micro-batch, weighted by its share of the samples; optimizer.step."""

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        job.optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in zip(inputs.split(micro), targets.split(micro), strict=True):
            loss = job.workload.loss(forward(x), y)
            if len(x) < len(inputs):
                loss = loss * (len(x) / len(inputs))
            loss.backward()
            total += loss.detach()
        job.optimizer.step()
        return total

    return step


def _plain(job: Job) -> Running:
    return Running(_accumulating(job, job.module, job.setting.micro or job.batch))


def _recompute(job: Job) -> Running:
    """``torch.utils.checkpoint`` around every block, as PyTorch's and transformers' documents have it."""
    for block in job.workload.blocks(job.module):
        block.forward = _recomputed(block.forward)
    return _plain(job)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call


def _compile(job: Job) -> Running:
    import torch._functorch.config
    import torch._inductor.config

    # Workers forked from a process with threads of its own may hang.
    torch._inductor.config.compile_threads = 1
    if job.setting.ratio is not None:
        torch._functorch.config.activation_memory_budget = job.setting.ratio
    return Running(_accumulating(job, torch.compile(job.module), job.setting.micro or job.batch))


def _save_on_cpu(job: Job) -> Running:
    def forward(inputs: torch.Tensor) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return job.module(inputs)

    return Running(_accumulating(job, forward, job.batch))


def _finder(job: Job) -> Running:
    """accelerate's search, each try a whole step of accumulation, under a data limit that makes overruns errors.

    It is helped where it would fail for reasons beside the point: halving, since oneDNN keeps kernels of tens of
    megabytes for every batch size it has met; oneDNN's own error for want of memory told as what it is; and what a
    backward pass that failed has left queued in the engine, its graph with it, drained.
    """
    assert job.setting.budget is not None
    found = {"micro": job.batch, "tries": 0}
    present = sum(tensor.nbytes for tensor in [*job.module.parameters(), *job.module.buffers()])
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (process_memory().data - present + job.setting.budget + _MARGIN, hard))

    def halve() -> int:
        found["micro"] //= 2
        return found["micro"]

    @find_executable_batch_size(starting_batch_size=job.batch, reduce_batch_size_fn=halve)
    def attempt(batch_size: int, inputs: torch.Tensor, targets: torch.Tensor) -> Any:
        found["tries"] += 1
        torch.zeros(1, requires_grad=True).sum().backward()
        try:
            return _accumulating(job, job.module, batch_size)(inputs, targets)
        except RuntimeError as error:
            if "could not create a primitive" in str(error):
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory (oneDNN)") from error
            raise

    return Running(attempt, lambda: dict(found))


def _narrowboat(spills: bool) -> Callable[[Job], Running]:
    def prepare(job: Job) -> Running:
        options: dict[str, Any] = {}
        if job.setting.techniques is not None:
            options["techniques"] = set(job.setting.techniques)
        job.spill.mkdir(parents=True, exist_ok=True)
        step = nb.train_step(
            job.module,
            job.workload.loss,
            job.optimizer,
            budget=job.setting.budget,
            spill=job.spill if spills else None,
            **options,
        )
        return Running(step, lambda: _told_by(step))

    return prepare


def _told_by(step: Any) -> dict[str, Any]:
    """What a narrowboat step knows of its plan, as far as JSON can hold it."""
    told: dict[str, Any] = {"min_budget": step.plan.min_budget}
    for name in ("predicted_peak", "predicted_slowdown", "micro_batches", "spilled_bytes"):
        with contextlib.suppress(AttributeError):
            value = getattr(step.plan, name)
            if isinstance(value, int | float | str):
                told[name] = value
    return told


TECHNIQUES = ("accumulate", "recompute", "reduce", "low_memory", "compact", "fuse", "spill", "state")

SUBJECTS: dict[str, Subject] = {
    "plain": Subject("plain PyTorch", _plain),
    "recompute": Subject("static recompute", _recompute, static=True),
    "accumulate": Subject("static accumulation", _plain, static=True),
    "both": Subject("static recompute and accumulation", _recompute, static=True),
    "compile": Subject(
        "torch.compile, activation_memory_budget",
        _compile,
        eager=False,
        note="its budget is a ratio of what is saved for backward, not a number of bytes",
    ),
    "save_on_cpu": Subject(
        "save_on_cpu",
        _save_on_cpu,
        note="moves saved tensors from a device to the host's memory: on a CPU there is nothing to move, "
        "and it saves nothing",
    ),
    "finder": Subject(
        "accelerate find_executable_batch_size",
        _finder,
        note="under RLIMIT_DATA = budget + 64 MiB, or an overrun would be a kill and no error; "
        "accumulates to the whole batch",
        policy=MallocPolicy.BALANCED,
    ),
    "narrowboat": Subject("narrowboat", _narrowboat(spills=False), ours=True),
    "narrowboat_spill": Subject("narrowboat, spill", _narrowboat(spills=True), ours=True),
}
