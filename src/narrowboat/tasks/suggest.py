"""What would admit a set that was refused: each proposal has passed the analysis that refused it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from narrowboat.quantities import format_bytes
from narrowboat.tasks.admission import DEFAULT_CHUNK, analysis_tasks, memory_need, schedulable, supply_of
from narrowboat.tasks.allocate import grow
from narrowboat.tasks.analysis import edf, fp
from narrowboat.tasks.analysis.model import Task
from narrowboat.tasks.costed import CostedTask
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec
from narrowboat.tasks.words import format_exactly

_MOST_PIECES = 50  # of one block: finer cuts are none that anybody could make
_MOST_TIMES = 16  # the period: beyond that it is another task


def suggestions(tasks: Sequence[CostedTask], settings: TasksSpec, chunk: int = DEFAULT_CHUNK) -> list[str]:
    """What would help, the smallest change of each kind; several may be needed where memory and time both fail."""
    said = []
    needed = memory_need(tasks, settings)[1]
    if needed > settings.budget:
        said.append(f"budget: {format_bytes(needed)} ({needed} bytes) would hold them")
        said += _without_preemption(tasks, settings, chunk)
    analysed = analysis_tasks(tasks, settings, chunk)
    if not schedulable(analysed, settings):
        said += [*_cuts(analysed, settings), *_pins(tasks, settings, chunk)]
        said += [*_periods(tasks, settings, chunk), *_deadlines(tasks, settings, chunk)]
    return said


def _without_preemption(tasks: Sequence[CostedTask], settings: TasksSpec, chunk: int) -> list[str]:
    """Jobs that are not preempted keep no blocks."""
    if settings.preemption == "np":
        return []
    other = settings.model_copy(update={"preemption": "np"})
    needed = memory_need(tasks, other)[1]
    if needed > settings.budget or not schedulable(analysis_tasks(tasks, other, chunk), other):
        return []
    return [f"preemption: np needs {format_bytes(needed)} only, and every deadline still holds"]


def _cuts(tasks: Sequence[Task], settings: TasksSpec) -> list[str]:
    """Finer blocks of one task, so that it blocks others for less time."""
    if settings.preemption == "np":
        return []
    said = []
    for place, task in enumerate(tasks):
        if settings.policy == "edf":
            limit = edf.largest_segment(tasks, task, supply_of(settings))
        else:
            limit = fp.largest_segment(tasks, task)
        if limit is None or not task.longest // _MOST_PIECES < limit < task.longest:
            continue
        cut = [*tasks[:place], replace(task, segments=_finer(task.segments, limit)), *tasks[place + 1 :]]
        if schedulable(cut, settings):
            block = task.segments.index(task.longest)
            said.append(
                f"finer cuts: {task.name}'s segments of {format_exactly(limit)} at most would do (its longest, of "
                f"block {max(block - 1, 0)}, is {format_exactly(task.longest)})"
            )
    return said


def _finer(segments: Sequence[int], limit: int) -> tuple[int, ...]:
    """The same work in pieces of at most ``limit``, as even as can be."""
    pieces: list[int] = []
    for length in segments:
        count = max(-(-length // limit), 1)
        pieces += [length // count + (k < length % count) for k in range(count)]
    return tuple(pieces)


def _pins(tasks: Sequence[CostedTask], settings: TasksSpec, chunk: int) -> list[str]:
    """Weights that stay in memory, fewest bytes first."""
    roomy = settings.model_copy(update={"budget": 1 << 62})
    pinned = grow(tuple(tasks), roomy, lambda task: 1 / task.spec.step, until_schedulable=True)
    if not schedulable(analysis_tasks(pinned, settings, chunk), settings):
        return []
    added = [
        f"{format_bytes(after.pinned_bytes - before.pinned_bytes)} of {after.name}"
        for before, after in zip(tasks, pinned, strict=True)
        if after.pinned_bytes > before.pinned_bytes
    ]
    needed = memory_need(pinned, settings)[1]
    room = "which the budget has room for" if needed <= settings.budget else f"with a budget of {needed} bytes"
    return [f"pin: {', '.join(added)} resident, {room} (allocation: optimal)"] if added else []


def _periods(tasks: Sequence[CostedTask], settings: TasksSpec, chunk: int) -> list[str]:
    """A longer period for one task: the smallest change of all tasks'."""
    found: list[tuple[float, str]] = []
    for task in tasks:
        if not task.spec.guaranteed:
            continue
        step = task.spec.step

        def changed(longer: int, spec: TaskSpec = task.spec) -> TaskSpec:
            if spec.contract is not None:
                return spec.model_copy(update={"contract": spec.contract.model_copy(update={"period": longer})})
            return spec.model_copy(update={"period": longer})

        least = _least(step, step * _MOST_TIMES, _holds_with(tasks, task, changed, settings, chunk))
        if least is not None:
            found.append(
                (least / step, f"period: {format_exactly(least)} instead of {format_exactly(step)} for {task.name}")
            )
    return [min(found)[1]] if found else []


def _deadlines(tasks: Sequence[CostedTask], settings: TasksSpec, chunk: int) -> list[str]:
    """A later deadline for one task, if its period allows one."""
    said = []
    for task in tasks:
        deadline = task.spec.relative_deadline
        if not task.spec.guaranteed or deadline >= task.spec.interval:
            continue

        def changed(later: int, spec: TaskSpec = task.spec) -> TaskSpec:
            return spec.model_copy(update={"deadline": later})

        least = _least(deadline, task.spec.interval, _holds_with(tasks, task, changed, settings, chunk))
        if least is not None:
            said.append(f"deadline: {format_exactly(least)} instead of {format_exactly(deadline)} for {task.name}")
    return said


def _holds_with(
    tasks: Sequence[CostedTask],
    task: CostedTask,
    change: Callable[[int], TaskSpec],
    settings: TasksSpec,
    chunk: int,
) -> Callable[[int], bool]:
    """Whether the set holds, and needs no more memory, when one task is described otherwise.

    Deadlines say who preempts whom, and so how many blocks are kept at once.
    """
    most = max(memory_need(tasks, settings)[1], settings.budget)

    def holds(value: int) -> bool:
        other = [replace(each, spec=change(value)) if each is task else each for each in tasks]
        return memory_need(other, settings)[1] <= most and schedulable(
            analysis_tasks(other, settings, chunk), settings
        )

    return holds


def _least(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The least value for which it holds, up to a thousandth; None if none is found.

    What holds need not hold further up: a longer deadline may have a task keep a block where it kept none.
    """
    while not holds(high):
        high = (low + high) // 2
        if high - low <= max(low // 100, 1):
            return None
    while high - low > max(low // 1000, 1):
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
