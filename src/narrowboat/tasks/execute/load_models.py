"""The networks of a set, each once: tasks that run one network share its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from narrowboat.errors import NarrowboatError, TaskSpecError
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.machine.memory import process_memory, resident_bytes
from narrowboat.profile.memory import activation_parts, carried_bytes
from narrowboat.profile.warmup import warm_up, warm_up_stand_ins, warm_up_tracer
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec, network_key

_PER_TASK = 1 << 20  # bytes of a thread, its stack and buffers, and of the record
POLICY = MallocPolicy.BALANCED  # holes from 1 MiB go back, so that jobs in between each other do not pile them up


class Loaded:
    """All networks of a set.

    Attributes:
        folder: that paths are meant from.
        baseline: resident bytes of the process without them, what their factories import included.
        of: the network of each task, by the task's name.
        digests: by the task's name, what is equal for tasks that share a network.
    """

    def __init__(self, settings: TasksSpec, folder: Path, tell: Callable[[str], None]) -> None:
        torch.set_num_threads(1)
        warm_up()
        warm_up_tracer()
        warm_up_stand_ins()
        self.baseline = process_memory().rss
        self.of: dict[str, TaskModel] = {}
        self.digests: dict[str, str] = {}
        self.folder, self._tell = folder, tell
        self._known: dict[tuple[str, str | None], TaskModel] = {}
        self.of = self.open(settings)
        self.digests = {name: digest_of(model) for name, model in self.of.items()}
        set_malloc_policy(POLICY)

    def open(self, settings: TasksSpec) -> dict[str, TaskModel]:
        """The network of each task by the task's name; those that are open already are not opened again.

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
                    held = resident_bytes()
                    model = self._known[key] = _open(task, self.folder)
                    self.baseline += model.prepared.library_bytes
                    model.grown_bytes = resident_bytes() - held - model.prepared.library_bytes
                found[task.name] = self._known[key]
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


def held_bytes(model: TaskModel, seen: Mapping[str, Any]) -> dict[str, int]:
    """What it takes beside weights that come and go, as ``CostedTask`` has it.

    Args:
        model: opened.
        seen: ``busy_bytes`` and ``left_bytes`` as they were measured; what should have been more, is taken for more.
    """
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


def digest_of(model: TaskModel) -> str:
    """Of weights, model code, inputs' shapes, torch and processor: what measurements depend on."""
    return hashlib.sha256(json.dumps(model.identity, sort_keys=True).encode()).hexdigest()[:32]


def spec_name(name: str) -> str:
    """``zoo:NAME`` in full."""
    return f"narrowboat.{name}" if name.startswith("zoo:") else name


def _open(task: TaskSpec, folder: Path) -> TaskModel:
    assert task.model is not None
    source = folder / task.input.file if task.input is not None and task.input.file is not None else None
    name = spec_name(task.model)
    if ":" not in name:
        name = str(folder / name)
    try:
        return TaskModel(name, folder / task.weights if task.weights is not None else None, source)
    except NarrowboatError as error:
        error.args = (f"task {task.name!r}: {error}", *error.args[1:])
        raise
