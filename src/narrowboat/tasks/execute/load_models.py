"""The networks of a set, each once: tasks that run one network share its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from narrowboat.errors import NarrowboatError, TaskSpecError
from narrowboat.machine.memory import process_memory
from narrowboat.profile.warmup import warm_up, warm_up_stand_ins, warm_up_tracer
from narrowboat.quantities import format_bytes
from narrowboat.tasks.execute.device_ground import DeviceGround, ground_of
from narrowboat.tasks.execute.ground import Ground
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec, network_key
from narrowboat.zoo.text_facts import rebase

Mirrors = Mapping[str, Collection[int]]  # units in host memory, by the task's name


class Loaded:
    """All networks of a set.

    Args:
        settings: the description.
        folder: that paths are meant from.
        tell: called with what takes long, in words.
        mirrors: on a device, what of the networks is kept in host memory; None to choose now.

    Attributes:
        folder: that paths are meant from.
        ground: where they run.
        host_budget: bytes of pinned host memory that there are for them.
        of: the network of each task, by the task's name.
        digests: by the task's name, what is equal for tasks that share a network.
    """

    def __init__(
        self,
        settings: TasksSpec,
        folder: Path,
        tell: Callable[[str], None],
        mirrors: Mirrors | None = None,
    ) -> None:
        if not settings.device.startswith("cuda"):
            torch.set_num_threads(1)
        warm_up()
        warm_up_tracer()
        warm_up_stand_ins()
        self.ground: Ground = ground_of(settings, process_memory().rss)
        self.host_budget = 0
        self.of: dict[str, TaskModel] = {}
        self.digests: dict[str, str] = {}
        self.folder, self._tell = folder, tell
        self._known: dict[tuple[str, str | None], TaskModel] = {}
        self.of = self.open(settings, mirrors)
        self.digests = {name: digest_of(model) for name, model in self.of.items()}
        self.ground.opened()

    def open(self, settings: TasksSpec, mirrors: Mirrors | None = None) -> dict[str, TaskModel]:
        """The network of each task by the task's name; those that are open already are not opened again.

        Args:
            settings: the description.
            mirrors: as for the class.

        Raises:
            NarrowboatError: a network cannot be opened; none of the new ones stays.
        """
        found: dict[str, TaskModel] = {}
        before = set(self._known)
        try:
            for task in settings.tasks:
                if task.model is None:
                    raise TaskSpecError(
                        f"task {task.name!r} has blocks and no model: it can be simulated, and not run"
                    )
                key = network_key(task)
                if key not in self._known:
                    self._tell(f"loading {task.name}")
                    self._known[key] = _open(task, self.folder, self.ground)
                found[task.name] = self._known[key]
            if isinstance(self.ground, DeviceGround):
                self.host_budget = self.ground.plan_mirrors(found, mirrors)
                self._tell(f"host memory for weights: {format_bytes(self.host_budget)}")
        except NarrowboatError:
            for key in set(self._known) - before:
                self._known.pop(key).close()
            raise
        return found

    def keep_only(self, models: Collection[TaskModel]) -> None:
        """Close the others."""
        for key, model in list(self._known.items()):
            if model not in models:
                model.dismantle()
                model.close()
                del self._known[key]


def digest_of(model: TaskModel) -> str:
    """Of weights, model code, inputs' shapes, torch and processor: what measurements depend on."""
    return hashlib.sha256(json.dumps(model.identity, sort_keys=True).encode()).hexdigest()[:32]


def spec_name(name: str) -> str:
    """``zoo:NAME`` in full."""
    return f"narrowboat.{name}" if name.startswith("zoo:") else name


def _open(task: TaskSpec, folder: Path, ground: Ground) -> TaskModel:
    assert task.model is not None
    source = folder / task.input.file if task.input is not None and task.input.file is not None else None
    try:
        name = rebase(spec_name(task.model), folder)
        return ground.open(name, folder / task.weights if task.weights is not None else None, source)
    except NarrowboatError as error:
        error.args = (f"task {task.name!r}: {error}", *error.args[1:])
        raise
