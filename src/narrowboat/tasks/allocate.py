"""How the budget is shared: which weights of whom stay in memory.

SwapNet's rule (its paper names required-memory ratio and performance score, and leaves the rest open) is stated here
as: task k gets ``floor_k + (B - sum of floors) * w_k / sum of w``, where ``floor_k`` is what it needs to
run at all, ``w_k = importance_k * (M_k / sum of M) * score_k``, ``M_k`` its bytes when all is resident and ``score_k``
the seconds per job that the next byte saves, on average up to all of them. Ours minimises the weighted slowdown, or
makes the set schedulable first, over all blocks of all tasks, whose windows are shared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from narrowboat.errors import BudgetError, UsageError
from narrowboat.quantities import format_bytes
from narrowboat.tasks.admission import analysis_tasks, memory_need, schedulable
from narrowboat.tasks.analysis.memory import largest_pair
from narrowboat.tasks.analysis.pipeline import segments
from narrowboat.tasks.costed import CostedTask
from narrowboat.tasks.cutting import cut_models
from narrowboat.tasks.spec.schema import TasksSpec

EXACT = 10  # units that can be pinned, up to which every choice is looked at


@dataclass(frozen=True)
class Allocation:
    """Who has what.

    Attributes:
        method: by which it was chosen.
        tasks: with their pins.
        shares: bytes of each task, and under ``""`` those that all share: windows of whoever runs, and spare. Their
            sum is the budget.
    """

    method: str
    tasks: tuple[CostedTask, ...]
    shares: Mapping[str, int]


Method = Callable[[Sequence[CostedTask], TasksSpec], Allocation]


def job_time(task: CostedTask) -> int:
    """Worst time of one job alone."""
    return sum(segments(task.blocks()))


def compute_time(task: CostedTask) -> int:
    """Time of one job with everything resident."""
    return max(sum(unit.compute for unit in task.units), 1)


def slowdown(tasks: Sequence[CostedTask]) -> float:
    """Weighted by importance: 1 where everything is resident."""
    weights = sum(task.spec.importance for task in tasks)
    return sum(task.spec.importance * job_time(task) / compute_time(task) for task in tasks) / weights


# -- by shares ---------------------------------------------------------------------------------------------------


def floor_bytes(task: CostedTask) -> int:
    """What the task needs to run at all, in a share of its own."""
    window = largest_pair([block.nbytes for block in task.blocks()])
    return window + _beside(task) + task.pinned_bytes


def _all_resident(task: CostedTask) -> int:
    return sum(unit.nbytes for unit in task.units) + _beside(task)


def _beside(task: CostedTask) -> int:
    return task.activation_bytes + task.fixed_bytes + task.busy_bytes


def _by_shares(method: str, tasks: Sequence[CostedTask], settings: TasksSpec, weights: Sequence[float]) -> Allocation:
    floors = [floor_bytes(task) for task in tasks]
    spare = settings.budget - sum(floors)
    if spare < 0:
        raise BudgetError(
            f"the tasks need {format_bytes(sum(floors))} in shares of their own, and the budget is "
            f"{format_bytes(settings.budget)}; allocation: optimal shares the windows and needs less",
            minimum=sum(floors),
        )
    total = sum(weights)
    exact = [spare * weight / total if total else spare / len(tasks) for weight in weights]
    shares = [floor + int(part) for floor, part in zip(floors, exact, strict=True)]
    # Whole bytes: the rest goes to those who lost most by rounding down.
    order = sorted(range(len(tasks)), key=lambda k: int(exact[k]) - exact[k])
    for k in range(settings.budget - sum(shares)):
        shares[order[k % len(tasks)]] += 1
    given = tuple(_fill(task, share) for task, share in zip(tasks, shares, strict=True))
    return Allocation(method, given, {task.name: share for task, share in zip(tasks, shares, strict=True)} | {"": 0})


def _fill(task: CostedTask, share: int) -> CostedTask:
    """Pin what saves most time per byte and fits the share."""
    refused: set[int] = set()
    while True:
        sizes = {unit: task.units[unit].nbytes for unit in task.swappable}
        values = {u: (gain / sizes[u], load / sizes[u]) for u, (gain, load) in task.pin_gains().items()}
        unit = max(values.keys() - refused, key=lambda u: values[u], default=None)
        if unit is None:
            return task
        option = task.with_pins(task.pins | {unit})
        if floor_bytes(option) <= share:
            task = option
        else:
            refused.add(unit)


def even(tasks: Sequence[CostedTask], settings: TasksSpec) -> Allocation:
    """Everybody gets what it needs, and as much more as everybody else."""
    return _by_shares("even", tasks, settings, [1.0] * len(tasks))


def proportional(tasks: Sequence[CostedTask], settings: TasksSpec) -> Allocation:
    """Everybody gets what it needs, and more in proportion to the size of its network."""
    return _by_shares("proportional", tasks, settings, [float(_all_resident(task)) for task in tasks])


def swapnet(tasks: Sequence[CostedTask], settings: TasksSpec) -> Allocation:
    """SwapNet's rule, as stated above."""
    total = sum(_all_resident(task) for task in tasks)
    weights = []
    for task in tasks:
        streamed = sum(task.units[unit].nbytes for unit in task.swappable)
        score = (job_time(task) - compute_time(task)) / streamed if streamed else 0.0
        weights.append(task.spec.importance * _all_resident(task) / max(total, 1) * max(score, 0.0))
    return _by_shares("swapnet", tasks, settings, weights)


# -- ours --------------------------------------------------------------------------------------------------------


def optimal(tasks: Sequence[CostedTask], settings: TasksSpec) -> Allocation:
    """Pins over all tasks at once: schedulable first, then the least weighted slowdown.

    Exact where at most :data:`EXACT` units can be pinned; else greedy by what a byte brings, with the analysis and
    the memory test in the loop.
    """
    best = _pinned(tuple(tasks), settings)
    pinned: dict[str, int] = {}
    seen: set[str] = set()
    for task in best:
        first = not task.network or task.network not in seen
        seen.add(task.network)
        pinned[task.name] = (task.pinned_bytes if first else 0) + task.fixed_bytes
    return Allocation("optimal", best, pinned | {"": settings.budget - sum(pinned.values())})


def _pinned(tasks: Sequence[CostedTask], settings: TasksSpec, *, exactly: bool = True) -> tuple[CostedTask, ...]:
    best, free = tuple(tasks), choices(tasks)
    if exactly and 0 < len(free) <= EXACT:
        return _exhaustive(best, settings, free)
    if not _holds(best, settings):
        best = grow(best, settings, lambda t: 1 / t.spec.step, until_schedulable=True)
    return grow(best, settings, lambda t: t.spec.importance / compute_time(t))


def choices(tasks: Sequence[CostedTask]) -> list[tuple[int, int]]:
    """(task, unit) that can be pinned; of tasks with one network only the first."""
    seen: set[str] = set()
    found = []
    for place, task in enumerate(tasks):
        if task.network and task.network in seen:
            continue
        seen.add(task.network)
        found += [(place, unit) for unit in task.swappable]
    return found


def _pin(tasks: Sequence[CostedTask], place: int, units: frozenset[int]) -> tuple[CostedTask, ...]:
    """With those units of one task's network resident, for everybody who has it."""
    network = tasks[place].network
    return tuple(
        task.with_pins(task.pins | units) if k == place or (network and task.network == network) else task
        for k, task in enumerate(tasks)
    )


def _holds(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    return schedulable(analysis_tasks(tasks, settings), settings)


def _fits(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    return memory_need(tasks, settings)[1] <= settings.budget


def _exhaustive(
    tasks: tuple[CostedTask, ...], settings: TasksSpec, free: Sequence[tuple[int, int]]
) -> tuple[CostedTask, ...]:
    found: list[tuple[float, int, tuple[CostedTask, ...]]] = []
    for taken in product((False, True), repeat=len(free)):
        option = tasks
        for place in {place for place, _ in free}:
            units = frozenset(unit for (k, unit), yes in zip(free, taken, strict=True) if yes and k == place)
            option = _pin(option, place, units)
        if _fits(option, settings):
            found.append((slowdown(option), sum(taken), option))
    found.sort(key=lambda each: each[:2])
    # The best of those that hold; if none does, the quickest, for the explanation.
    return next((option for _, _, option in found if _holds(option, settings)), found[0][2] if found else tasks)


def grow(
    tasks: tuple[CostedTask, ...],
    settings: TasksSpec,
    weight: Callable[[CostedTask], float],
    *,
    until_schedulable: bool = False,
) -> tuple[CostedTask, ...]:
    """Pin one unit after the other, the one that brings most per byte, while they fit."""
    refused: set[tuple[int, int]] = set()
    while True:
        ranked = []
        gains = [task.pin_gains() for task in tasks]
        for place, unit in choices(tasks):
            if (place, unit) in refused:
                continue
            # Everybody who has the network saves.
            network = tasks[place].network
            sharing = [k for k, t in enumerate(tasks) if k == place or (network and t.network == network)]
            parts = [(weight(tasks[k]), gains[k].get(unit, (0, 0))) for k in sharing]
            nbytes = tasks[place].units[unit].nbytes
            value = tuple(sum(factor * gain[i] for factor, gain in parts) / nbytes for i in (0, 1))
            ranked.append((value, place, unit))
        if not ranked:
            return tasks
        _, place, unit = max(ranked)
        option = _pin(tasks, place, frozenset({unit}))
        if not _fits(option, settings):
            refused.add((place, unit))
            continue
        tasks = option
        if until_schedulable and _holds(tasks, settings):
            return tasks


METHODS: dict[str, Method] = {"optimal": optimal, "swapnet": swapnet, "even": even, "proportional": proportional}


def method_named(name: str) -> Method:
    """One of ours, or ``package.module:function`` of the user's.

    Raises:
        UsageError: neither.
    """
    if name in METHODS:
        return METHODS[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise UsageError(f"allocation {name!r} is not known: use {', '.join(METHODS)}, or package.module:function")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"allocation {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UsageError(f"allocation {name!r} is a {type(found).__name__}, not a function")
    return found


def as_described(tasks: Sequence[CostedTask], settings: TasksSpec, method: str = "as described") -> Allocation:
    """Only what is pinned already: by the user, or by the ``method``."""
    own = {task.name: task.pinned_bytes + task.fixed_bytes for task in tasks}
    return Allocation(method, tuple(tasks), own | {"": settings.budget - sum(own.values())})


def allocate(tasks: Sequence[CostedTask], settings: TasksSpec) -> Allocation:
    """Share the budget as the description says; unsaid, ours for models, and blocks as they are described.

    Networks that were measured are cut into blocks here: what may be resident depends on where they are cut.
    """
    models = any(task.spec.blocks is None for task in tasks)
    if models:
        tasks = cut_models(tasks, settings, lambda cut: _pinned(cut, settings, exactly=False), slowdown)
        tasks = [task if task.spec.pinned else task.with_pins(frozenset()) for task in tasks]
    if settings.allocation is None:
        return optimal(tasks, settings) if models else as_described(tasks, settings)
    method = method_named(settings.allocation)
    try:
        found = method(tasks, settings)
    except TypeError as error:
        raise UsageError(f"allocation {settings.allocation!r} cannot be used: {error}") from error
    if not isinstance(found, Allocation):
        raise UsageError(f"allocation {settings.allocation!r} gave a {type(found).__name__}, not an Allocation")
    return found
