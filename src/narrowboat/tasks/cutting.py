"""Blocks for the networks of a set: short jobs, segments that let others in, and windows that fit the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from narrowboat.tasks.admission import analysis_tasks, memory_need, schedulable, supply_of
from narrowboat.tasks.analysis import edf, fp
from narrowboat.tasks.analysis.memory import largest_pair
from narrowboat.tasks.costed import CostedTask
from narrowboat.tasks.spec.schema import TasksSpec

# Shares of a network that two neighbouring blocks may take together; the least is what the units force.
_ROOMS = (1.0, 0.5, 0.3, 0.2, 0.12, 0.07, 0.0)
Finish = Callable[[Sequence[CostedTask]], tuple[CostedTask, ...]]


def cut_models(
    tasks: Sequence[CostedTask], settings: TasksSpec, finish: Finish, worth: Callable[[Sequence[CostedTask]], float]
) -> tuple[CostedTask, ...]:
    """Cut every measured network; tasks that are described by blocks stay as they are.

    Small windows leave bytes for resident weights, large ones make fewer boundaries: every size is tried, each
    finished with pins, and the best that is admitted wins.

    Args:
        tasks: in units.
        settings: budget, policy, overhead.
        finish: adds pins.
        worth: the slowdown of a finished set; less is better.
    """
    best: tuple[tuple[bool, bool, float], tuple[CostedTask, ...]] | None = None
    for room in _ROOMS:
        cut = _cut(tasks, settings, room, {})
        fits = memory_need(cut, settings)[1] <= settings.budget
        if not fits and room != _ROOMS[-1]:
            continue
        cut = finish(cut)
        if not _holds(cut, settings):
            finer = finish(_cut(tasks, settings, room, _limits(cut, settings)))
            if memory_need(finer, settings)[1] <= settings.budget or not fits:
                cut = finer
        rank = (not fits, not _holds(cut, settings), worth(cut))
        if best is None or rank < best[0]:
            best = rank, cut
    assert best is not None
    return best[1]


def _cut(
    tasks: Sequence[CostedTask], settings: TasksSpec, room: float, limits: dict[str, int]
) -> tuple[CostedTask, ...]:
    done: dict[str, tuple[int, ...] | None] = {}
    cut = []
    for task in tasks:
        if task.spec.blocks is not None:
            cut.append(task)
            continue
        key = task.network or f"\0{task.name}"
        if key not in done:
            same = [other for other in tasks if other is task or (task.network and other.network == task.network)]
            longest = min((limits[other.name] for other in same if other.name in limits), default=None)
            done[key] = _ends(task, settings, room, longest)
        ends = done[key]
        cut.append(task if ends is None else task.with_ends(ends))
    return tuple(cut)


def _ends(task: CostedTask, settings: TasksSpec, room: float, longest: int | None) -> tuple[int, ...] | None:
    sizes = [unit.nbytes for unit in task.units]
    space = max(round(room * sum(sizes)), largest_pair(sizes))
    found = task.cut(longest=longest, room=space, overhead=settings.overhead)
    # A unit can be longer than what would be wished for.
    found = found or task.cut(room=space, overhead=settings.overhead)
    return found.ends if found is not None else None


def _limits(tasks: Sequence[CostedTask], settings: TasksSpec) -> dict[str, int]:
    """The longest segments that others can bear."""
    if settings.preemption == "np":
        return {}
    analysed = analysis_tasks(tasks, settings)
    found = {}
    for task in analysed:
        if settings.policy == "edf":
            limit = edf.largest_segment(analysed, task, supply_of(settings))
        else:
            limit = fp.largest_segment(analysed, task)
        if limit is not None and limit > 0:
            found[task.name] = limit
    return found


def _holds(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    return schedulable(analysis_tasks(tasks, settings), settings)
