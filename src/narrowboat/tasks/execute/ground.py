"""Where tasks' blocks come and go, and what is counted: the process's memory, here; a device's, ``device_ground``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from narrowboat.arena.device.interface import Device
from narrowboat.arena.pool import PagePool
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy, trim
from narrowboat.machine.memory import process_memory, reset_peak, resident_bytes
from narrowboat.profile.memory import activation_parts, carried_bytes
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.space import Pool

_PER_TASK = 1 << 20  # bytes of a thread, its stack and buffers, and of the record
POLICY = MallocPolicy.BALANCED  # holes from 1 MiB go back, so that jobs in between each other do not pile them up


class Ground(Protocol):
    """What differs between executors by where their tasks run.

    Attributes:
        device: None for the processor.
        torch_device: of weights and activations.
        baseline: bytes held without the tasks.
        condition: under which costs are measured, in words.
    """

    device: Device | None
    torch_device: torch.device
    baseline: int
    condition: str

    def open(self, spec: str, weights: Path | None, source: Path | None) -> TaskModel:
        """A network. Raises NarrowboatError: it cannot be used."""

    def pool(self, nbytes: int) -> Pool:
        """Memory for blocks that come and go. Raises StorageError: there is no such memory."""

    def begin_thread(self) -> None:
        """The calling thread is one that computes or loads."""

    def held(self) -> int:
        """Bytes over the baseline now."""

    def peak(self) -> int:
        """Most bytes over the baseline since ``reset_peak``."""

    def reset_peak(self) -> None:
        """Count the peak anew."""

    def relieve(self) -> None:
        """Give back what the heap keeps and nobody uses, while tasks run."""

    def clear(self) -> None:
        """The same thoroughly, while none runs."""

    def prepare(self, model: TaskModel) -> None:
        """A network is about to be laid out for the first time. Raises NarrowboatError: there is no room for it."""

    def check(self, budget: int) -> None:
        """Before anything is taken. Raises DeviceMemoryError: there is not so much memory."""

    def opened(self) -> None:
        """The networks are open."""

    def limit(self, budget: int, pool_bytes: int) -> None:
        """A run is about to begin, or to go on, in this budget, of which so much is the pool's."""

    def heap_bytes(self) -> int:
        """Bytes beside blocks that come and go, now; only differences mean anything."""

    def heap_peak(self, pool: Pool) -> int:
        """The most of those since ``reset_peak``, while ``pool`` was full at some time."""

    def costs_of(self, model: TaskModel, seen: Mapping[str, Any]) -> dict[str, int]:
        """What a network takes beside weights that come and go, as ``CostedTask`` has it.

        Args:
            model: opened.
            seen: ``busy_bytes`` and ``left_bytes`` as they were measured; what should have been more, is taken for
                more.
        """

    def chunk_bytes(self, model: TaskModel) -> int:
        """Bytes that a load which is given up may still bring."""

    def hand_over(self) -> object:
        """See ``Device``."""

    def take_over(self, token: object) -> None:
        """See ``Device``."""

    def figures(self) -> dict[str, Any]:
        """For the record, beside what every run tells."""


class HostGround(Ground):
    """In the process's own memory.

    Args:
        baseline: resident bytes of the process without the tasks.
    """

    device = None
    torch_device = torch.device("cpu")
    condition = (
        "blocks computed while the next is read, caches and heap cold at each job's start; one thread per operator"
    )

    def __init__(self, baseline: int = 0) -> None:
        self.baseline = baseline

    def open(self, spec: str, weights: Path | None, source: Path | None) -> TaskModel:
        """See ``Ground``."""
        held = resident_bytes()
        model = TaskModel(spec, weights, source)
        self.baseline += model.prepared.library_bytes
        model.grown_bytes = resident_bytes() - held - model.prepared.library_bytes
        return model

    def pool(self, nbytes: int) -> Pool:
        """See ``Ground``."""
        return PagePool(nbytes, lock=True)

    def begin_thread(self) -> None:
        """See ``Ground``."""
        torch.set_num_threads(1)

    def held(self) -> int:
        """See ``Ground``."""
        return resident_bytes() - self.baseline

    def peak(self) -> int:
        """See ``Ground``: by the kernel's high-water mark."""
        return process_memory().hwm - self.baseline

    def reset_peak(self) -> None:
        """See ``Ground``."""
        reset_peak()

    def relieve(self) -> None:
        """See ``Ground``."""
        trim(refill=False)

    def clear(self) -> None:
        """See ``Ground``."""
        trim()

    def prepare(self, model: TaskModel) -> None:
        """See ``Ground``."""

    def check(self, budget: int) -> None:
        """See ``Ground``: the kernel says so when it is taken."""

    def opened(self) -> None:
        """See ``Ground``."""
        set_malloc_policy(POLICY)

    def limit(self, budget: int, pool_bytes: int) -> None:
        """See ``Ground``."""

    def heap_bytes(self) -> int:
        """See ``Ground``."""
        return resident_bytes()

    def heap_peak(self, pool: Pool) -> int:
        """See ``Ground``."""
        return process_memory().hwm - pool.nbytes

    def costs_of(self, model: TaskModel, seen: Mapping[str, Any]) -> dict[str, int]:
        """See ``Ground``."""
        parts = activation_parts(model.trace, POLICY)
        boundaries = [unit.first_step for unit in model.units[1:]]
        return {
            "fixed_bytes": max(model.fixed_bytes, model.grown_bytes)
            + model.staying_bytes
            + seen["left_bytes"]
            + _PER_TASK,
            "staying_bytes": model.staying_bytes,
            "busy_bytes": max(sum(parts.values()), seen["busy_bytes"]),
            "carried_bytes": min(carried_bytes(model.trace, boundaries), parts["activations"]),
        }

    def chunk_bytes(self, model: TaskModel) -> int:
        """See ``Ground``."""
        return model.prepared.storage.chunk * model.prepared.storage.depth

    def hand_over(self) -> object:
        """See ``Ground``."""
        return None

    def take_over(self, token: object) -> None:
        """See ``Ground``."""

    def figures(self) -> dict[str, Any]:
        """See ``Ground``."""
        return {}
