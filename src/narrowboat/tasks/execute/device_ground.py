"""Tasks on a device: what they share there, and what of its memory they hold."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from narrowboat.arena.device.find import open_device
from narrowboat.arena.device.interface import Device
from narrowboat.errors import ExecutorError, UsageError
from narrowboat.machine.device_name import parse_device
from narrowboat.profile.memory import carried_bytes
from narrowboat.quantities import format_bytes
from narrowboat.stream.reader import PAGE
from narrowboat.stream.staging import Staging, staging_bytes
from narrowboat.stream.tiers import check_free, host_bytes
from narrowboat.tasks.execute.device_load import AHEAD
from narrowboat.tasks.execute.device_model import DeviceTaskModel
from narrowboat.tasks.execute.device_place import ChunkPool, Tally
from narrowboat.tasks.execute.ground import Ground, HostGround
from narrowboat.tasks.execute.mirrors import choose_mirrored
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.space import Pool
from narrowboat.tasks.spec.schema import TasksSpec

_READ = 1 << 20  # bytes of one read on the way to the device
_LEAST_READ = 64 << 10
_BUFFERS = 16  # about as many are pinned at once


class DeviceGround(Ground):
    """See ``ground.Ground``.

    Args:
        device: which.
        host_budget: bytes of pinned host memory; None: what networks need within half of what the host can spare.
        chunk: bytes of device memory that come and go together, rounded up to the granularity; None for that.
        identity: of the device, for what is measured on it; None for its name.

    Attributes:
        copies: the stream of the load engine.
        tally: what is mapped.
        staging: buffers for what is not in host memory; None while all is.
        copied: bytes, to the device.

    Raises:
        UsageError: it shares the host's memory.
    """

    condition = "blocks computed on the device while the next is copied in, its caches cold at each job's start"

    def __init__(
        self, device: Device, *, host_budget: int | None = None, chunk: int | None = None, identity: str | None = None
    ) -> None:
        if device.unified:
            raise UsageError(
                f"{device.name} shares the host's memory: there is nothing to copy. Tasks do not run on such a device "
                "yet; use device: cpu"
            )
        self.device: Device = device
        self.torch_device = device.torch_device
        self.identity = identity or device.name
        self.chunk = max(-(-(chunk or 0) // device.granularity), 1) * device.granularity
        self.copies = device.stream("loads")
        self.tally = Tally()
        self.staging: Staging | None = None
        self.copied = 0
        self.baseline = self.heap_bytes()
        self._asked = host_budget
        self._open: list[DeviceTaskModel] = []
        self._counting = threading.Lock()
        self._known = device.hand_over()

    @property
    def read_chunk(self) -> int:
        """Bytes of one read at most, so that the buffers take a small part of the host's budget."""
        if self._asked is None:
            return _READ
        return max(min(_READ, self._asked // (2 * _BUFFERS)) // PAGE * PAGE, _LEAST_READ)

    # -- networks --------------------------------------------------------------------------------------

    def open(self, spec: str, weights: Path | None, source: Path | None) -> TaskModel:
        """See ``Ground``; what of it is in host memory is for ``plan_mirrors``."""
        before = self.heap_bytes()
        model = DeviceTaskModel(spec, weights, source, self)
        model.grown_bytes = self.heap_bytes() - before
        self._open.append(model)
        return model

    def closed(self, model: DeviceTaskModel) -> None:
        """It is."""
        if model in self._open:
            self._open.remove(model)

    def plan_mirrors(self, models: Mapping[str, TaskModel], wanted: Mapping[str, Collection[int]] | None) -> int:
        """Decide which units of the networks are kept in host memory: those wanted, or as many as there is room for.

        Args:
            models: of every task, by its name; several may have the same.
            wanted: units by the task's name, as they were when costs were measured; None to choose now.

        Returns:
            Bytes of host memory that there are for it.

        Raises:
            BudgetError: the host's budget is too small even for reading without.
            ExecutorError: it would be decided otherwise than before.
        """
        each: dict[str, DeviceTaskModel] = {}
        for name, model in models.items():
            if isinstance(model, DeviceTaskModel) and model not in each.values():
                each[name] = model
        sizes = {name: [-(-n // PAGE) * PAGE for n in model.used] for name, model in each.items()}
        room = host_bytes(self._asked, sum(map(sum, sizes.values())))
        if wanted is None:
            chosen = choose_mirrored(sizes, room, max((_buffers(model) for model in each.values()), default=0))
        else:
            chosen = {name: sorted(wanted.get(name, ())) for name in each}
        for name, model in each.items():
            if model.mirrored is not None and model.mirrored != chosen[name]:
                raise ExecutorError(
                    f"task {name!r} would have other weights in host memory than now: stop the run and start it anew"
                )
            model.plan_mirror(chosen[name])
        return room

    def prepare(self, model: TaskModel) -> None:
        """See ``Ground``: fill its host memory.

        Raises:
            PinnedMemoryError: the system refuses to pin so much.
            ExecutorError: other networks take the room.
            StorageError: its weights cannot be read.
        """
        assert isinstance(model, DeviceTaskModel) and model.mirrored is not None
        if model.reads:
            if self.staging is None:
                self.staging = Staging(self.device, model.reader.chunk, model.reader.workers)
            elif _buffers(model) > self.staging.nbytes:
                raise ExecutorError("the buffers for reading are too small for it: stop the run and start it anew")
        more = 0 if model.mirror.offsets else sum(-(-model.used[k] // PAGE) * PAGE for k in model.mirrored)
        if self._asked is not None and self.pinned_bytes + more > self._asked:
            raise ExecutorError(
                f"{format_bytes(more)} of its weights belong in host memory, where {format_bytes(self.pinned_bytes)} "
                f"of {format_bytes(self._asked)} are taken: stop the run and start it anew"
            )
        model.fill_mirror()

    @property
    def pinned_bytes(self) -> int:
        """Bytes of host memory that are pinned for the tasks."""
        buffers = self.staging.nbytes if self.staging is not None else 0
        return buffers + sum(model.mirror.nbytes for model in self._open)

    def count(self, nbytes: int) -> None:
        """So many bytes more were given to be copied to the device."""
        with self._counting:
            self.copied += nbytes

    # -- memory ----------------------------------------------------------------------------------------

    def pool(self, nbytes: int) -> Pool:
        """See ``Ground``."""
        return ChunkPool(nbytes, self.chunk)

    @property
    def _counts(self) -> bool:
        """Whether PyTorch's allocator takes from the device; an emulated one's activations are the process's."""
        return self.torch_device.type == "cuda"

    def heap_bytes(self) -> int:
        """See ``Ground``: what PyTorch's allocator has reserved."""
        return torch.cuda.memory_reserved(self.torch_device) if self._counts else 0

    def _heap_most(self) -> int:
        return torch.cuda.max_memory_reserved(self.torch_device) if self._counts else 0

    def heap_peak(self, pool: Pool) -> int:
        """See ``Ground``."""
        return self._heap_most()

    def held(self) -> int:
        """See ``Ground``: what is mapped, and what the allocator took beside it."""
        return self.tally.nbytes + max(self.heap_bytes() - self.baseline, 0)

    def peak(self) -> int:
        """See ``Ground``; never too little: the two parts need not have been at their most at once."""
        return self.tally.most + max(self._heap_most() - self.baseline, 0)

    def reset_peak(self) -> None:
        """See ``Ground``."""
        self.tally.begin_anew()
        if self._counts:
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def relieve(self) -> None:
        """See ``Ground``: the allocator keeps what it has, which is limited."""

    def clear(self) -> None:
        """See ``Ground``."""
        if self._counts:
            torch.cuda.empty_cache()

    def check(self, budget: int) -> None:
        """See ``Ground``."""
        check_free(self.device, budget - self.held())

    def opened(self) -> None:
        """See ``Ground``."""

    def limit(self, budget: int, pool_bytes: int) -> None:
        """See ``Ground``. Activations get what blocks leave, and no more: a job that wants it fails, and no other."""
        if self._counts:
            pinned = sum(model.resident_bytes for model in self._open)
            allowed = self.baseline + max(budget - pool_bytes - pinned, 0)
            fraction = min(allowed / self.device.memory()[1], 1.0)
            torch.cuda.set_per_process_memory_fraction(fraction, self.torch_device)

    def costs_of(self, model: TaskModel, seen: Mapping[str, Any]) -> dict[str, int]:
        """See ``Ground``: device memory only."""
        boundaries = [unit.first_step for unit in model.units[1:]]
        activations = model.trace.activation_bytes
        return {
            "fixed_bytes": max(model.fixed_bytes, model.grown_bytes) + model.staying_bytes + seen["left_bytes"],
            "staying_bytes": model.staying_bytes,
            "busy_bytes": max(activations, seen["busy_bytes"]) + self.device.workspace,
            "carried_bytes": min(carried_bytes(model.trace, boundaries), activations),
        }

    def chunk_bytes(self, model: TaskModel) -> int:
        """See ``Ground``."""
        reads = isinstance(model, DeviceTaskModel) and model.reads
        return max(AHEAD * self.chunk, 2 * model.reader.chunk * model.reader.workers if reads else 0)

    # -- threads ---------------------------------------------------------------------------------------

    def begin_thread(self) -> None:
        """See ``Ground``."""
        if self._counts:
            torch.cuda.set_device(self.torch_device)
        else:
            torch.set_num_threads(1)
        self.device.take_over(self._known)

    def hand_over(self) -> object:
        """See ``Ground``."""
        return self.device.hand_over()

    def take_over(self, token: object) -> None:
        """See ``Ground``."""
        self.device.take_over(token)

    def figures(self) -> dict[str, Any]:
        """See ``Ground``."""
        return {
            "device": self.device.name,
            "device_peak_mapped_bytes": self.tally.most,
            "device_copied_bytes": self.copied,
            "pinned_bytes": self.pinned_bytes,
        }

    def close(self) -> None:
        """The networks are closed."""
        for model in list(self._open):
            model.close()
        if self.staging is not None:
            self.staging.close()
            self.staging = None


def ground_of(settings: TasksSpec, baseline: int) -> Ground:
    """Where a description's tasks run.

    Args:
        settings: the description.
        baseline: resident bytes of the process without the tasks.

    Raises:
        NoDeviceError: there is no such device.
        UsageError: it has no memory of its own.
    """
    if settings.device == "cpu":
        return HostGround(baseline)
    device = open_device(settings.device)
    return DeviceGround(
        device,
        host_budget=settings.host_budget,
        chunk=settings.chunk,
        identity=settings.device if parse_device(settings.device).kind == "emulated" else None,
    )


def _buffers(model: TaskModel) -> int:
    """Bytes through which it is read."""
    return staging_bytes(model.reader.chunk, model.reader.workers)
