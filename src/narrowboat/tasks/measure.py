"""What the tasks' networks cost: asked of a process of its own, kept in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from narrowboat.errors import UsageError
from narrowboat.tasks.analysis.model import Block
from narrowboat.tasks.costed import CostedTask, described, slots_of
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec, network_key
from narrowboat.tasks.tensors import Signature


def request(settings: TasksSpec, folder: Path, do: str, **more: Any) -> dict[str, Any]:
    """What the executor's process is told."""
    return {"do": do, "settings": settings.plain(), "folder": str(folder), **more}


def measure_tasks(
    settings: TasksSpec, folder: Path, tell: Callable[[str], None] = lambda said: None, *, cached_only: bool = False
) -> tuple[list[CostedTask], int, dict[str, Any]]:
    """All tasks with what they cost, the microseconds of a chunk of reading, and what was told.

    Worst cases are the largest times measured, times the margin.

    Args:
        settings: the description.
        folder: that paths are meant from.
        tell: called with what takes long, in words.
        cached_only: measure nothing now; what is not known is refused.

    Raises:
        NarrowboatError: a model, its weights or inputs cannot be used, or the process ended.
    """
    from narrowboat.tasks.execute.client import Child
    from narrowboat.tasks.execute.input_files import check_inputs

    check_inputs(settings, folder)
    models = settings.model_copy(update={"tasks": tuple(task for task in settings.tasks if task.blocks is None)})
    told: dict[str, Any] = {}
    with Child(request(models, folder, "measure", cached_only=cached_only)) as child:
        for event in child.events():
            if event["event"] == "progress":
                tell(event["said"])
            elif event["event"] == "measured":
                told = event
    told["names"] = {network_key(spec): spec.name for spec in models.tasks}
    tasks, chunk = [], 0
    for spec in settings.tasks:
        tasks.append(costed_as_measured(spec, settings, told))
        if spec.blocks is None:
            cost = told["costs"][told["digests"][spec.name]]
            chunk = max(chunk, _chunk(cost, told["chunk_bytes"][spec.name], settings.margin))
    return tasks, chunk, told


def costed_as_measured(spec: TaskSpec, settings: TasksSpec, told: Mapping[str, Any]) -> CostedTask:
    """A task whose network has been measured, if under another task's name; or one that is described by blocks.

    Args:
        spec: of the task.
        settings: margin and device.
        told: what measuring told.

    Raises:
        UsageError: its network has not been measured.
    """
    if spec.blocks is not None:
        return described(spec)
    name = name_measured(spec, told)
    digest = told["digests"][name]
    cost = told["costs"][digest]
    units = tuple(_unit(unit, settings.margin) for unit in cost["units"])
    every = frozenset(k for k, unit in enumerate(units) if unit.nbytes) if spec.pinned else frozenset()
    samples = np.ceil(np.array(cost["samples"], dtype=float) * settings.margin).astype(np.int64)
    held = dict(told["held"][name])
    if settings.device == "cpu":
        held["fixed_bytes"] += _shared_bytes(spec, told["signatures"][name])
    return CostedTask(spec, units, network=digest, pins=every, samples=samples, **held)


def name_measured(spec: TaskSpec, told: Mapping[str, Any]) -> str:
    """The task under whose name a model's network was measured.

    Raises:
        UsageError: it was not.
    """
    name = told.get("names", {}).get(network_key(spec))
    if name is None:
        raise UsageError(f"nothing is known of {spec.name} here: make a TaskSet of that description")
    return str(name)


def _shared_bytes(spec: TaskSpec, signature: dict[str, Any]) -> int:
    """Of the memory through which a queue's tensors come and go: all slots are taken to be in use."""
    if spec.input is None or spec.input.queue is None or "error" in signature:
        return 0
    return slots_of(spec) * Signature.from_json(signature).slot_bytes


def _unit(told: dict[str, Any], margin: float) -> Block:
    load = math.ceil(told["load_us"]["max"] * margin) if told["bytes"] else 0
    return Block(
        max(load, 1) if told["bytes"] else 0, max(math.ceil(told["compute_us"]["max"] * margin), 1), told["bytes"]
    )


def _chunk(cost: dict[str, Any], chunk_bytes: int, margin: float) -> int:
    """Time that a read already under way takes to end, by the slowest byte rate seen."""
    rates = [
        u["bytes"] / u["load_us"]["max"] for u in cost["units"] if u["bytes"] >= chunk_bytes and u["load_us"]["max"]
    ]
    if not rates:
        return max((u["load_us"]["max"] for u in cost["units"]), default=0)
    return math.ceil(chunk_bytes / min(rates) * margin)
