"""What the tasks' networks cost: asked of a process of its own, kept in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from narrowboat.tasks.analysis.model import Block
from narrowboat.tasks.costed import CostedTask, described
from narrowboat.tasks.spec.schema import TasksSpec


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
    tasks, chunk = [], 0
    for spec in settings.tasks:
        if spec.blocks is not None:
            tasks.append(described(spec))
            continue
        digest = told["digests"][spec.name]
        cost = told["costs"][digest]
        units = tuple(_unit(unit, settings.margin) for unit in cost["units"])
        every = frozenset(k for k, unit in enumerate(units) if unit.nbytes) if spec.pinned else frozenset()
        samples = np.ceil(np.array(cost["samples"], dtype=float) * settings.margin).astype(np.int64)
        held = told["held"][spec.name]
        tasks.append(CostedTask(spec, units, network=digest, pins=every, samples=samples, **held))
        chunk = max(chunk, _chunk(cost, told["chunk_bytes"][spec.name], settings.margin))
    return tasks, chunk, told


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
