"""A rule for sharing a budget that is not narrowboat's: what ``allocation: package.module:function`` is for."""

from __future__ import annotations

from collections.abc import Sequence

from narrowboat.tasks.allocate import Allocation, floor_bytes
from narrowboat.tasks.costed import CostedTask
from narrowboat.tasks.spec.schema import TasksSpec


def bare_floors(tasks: Sequence[CostedTask], settings: TasksSpec) -> Allocation:
    """Everybody has what it needs to run at all, nothing stays in memory, and the rest is nobody's."""
    floors = {task.name: floor_bytes(task) for task in tasks}
    return Allocation("bare floors", tuple(tasks), {**floors, "": settings.budget - sum(floors.values())})
