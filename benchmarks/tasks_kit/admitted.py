"""Which sets each way of running them admits, by a test that is safe for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from narrowboat.tasks.admission import analysis_tasks, demand_holds, memory_need, schedulable, supply_of
from narrowboat.tasks.allocate import _pinned
from narrowboat.tasks.analysis import edf
from narrowboat.tasks.analysis.model import Arrival, Block, Task
from narrowboat.tasks.analysis.pipeline import segments, whole_swap
from narrowboat.tasks.costed import CostedTask
from narrowboat.tasks.cutting import cut_models
from narrowboat.tasks.spec.schema import TasksSpec
from tasks_kit.sets import Shape, random_set

Method = Callable[[Sequence[CostedTask], TasksSpec], bool]


def ours(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    """Blocks cut for the set, some resident, preemption at boundaries; without it where that needs less memory."""
    free = [replace(task, spec=task.spec.model_copy(update={"blocks": None})) for task in tasks]
    if sum(float(task.utilisation) for task in analysis_tasks([_resident(task) for task in free], settings, 0)) > 1:
        return False  # not even with everything resident
    for preemption in ("lp-keep", "np"):
        chosen = settings.model_copy(update={"preemption": preemption})
        cut = cut_models(free, chosen, lambda found, to=chosen: _grown(found, to), lambda found: 0.0)
        if memory_need(cut, chosen)[1] <= chosen.budget and schedulable(analysis_tasks(cut, chosen, 0), chosen):
            return True
    return False


def _resident(task: CostedTask) -> CostedTask:
    return task.with_pins(frozenset(range(len(task.units))))


def _grown(tasks: Sequence[CostedTask], settings: TasksSpec) -> tuple[CostedTask, ...]:
    if schedulable(analysis_tasks(tasks, settings, 0), settings):
        return tuple(tasks)
    return _pinned(tasks, settings)


def pipelined(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    """Demand Layering's way with several models: blocks as given, loads beside computing, jobs not preempted."""
    np = settings.model_copy(update={"preemption": "np"})
    return memory_need(tasks, np)[1] <= np.budget and schedulable(analysis_tasks(tasks, np, 0), np)


def whole_model(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    """Each job loads its network and then runs it; jobs are not preempted."""
    most = max(sum(u.nbytes for u in task.units) + task.activation_bytes for task in tasks)
    return most <= settings.budget and _holds([whole_swap(task.units) for task in tasks], tasks, settings)


def paging(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    """Demand paging: resident if all fits; otherwise every block may have been pushed out by others."""
    total = sum(sum(u.nbytes for u in task.units) + task.activation_bytes for task in tasks)
    if total <= settings.budget:
        return _holds([[Block(0, sum(u.compute for u in task.units))] for task in tasks], tasks, settings)
    return whole_model(tasks, settings)


def rtswap(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    """RT-Swap's rules, whole jobs under EDF with swap volumes (the paper's own test is not public; this one is safe).

    Volumes are chosen to be least under ``sum of (M - s) + max of s <= budget``; a job's worst case is its compute and
    its swap-in. In its favour, nothing is charged for swapping out: weights need not be written back. The job that a
    finished swap-in forces, and the swap under way, are blocking once more.
    """
    sizes = [sum(u.nbytes for u in task.units) + task.activation_bytes for task in tasks]
    rates = [sum(u.load for u in task.units) / max(sum(u.nbytes for u in task.units), 1) for task in tasks]
    need = sum(sizes) - settings.budget
    if need <= 0:
        volumes = [0] * len(tasks)
    else:
        # With everybody's volume v the condition is sum(M) - sum(s) + max(s) <= budget: water-filling over v.
        volumes = _least_volumes([sum(u.nbytes for u in task.units) for task in tasks], need)
        if not volumes:
            return False
    moves = [int(volume * rate) for volume, rate in zip(volumes, rates, strict=True)]
    computes = [sum(u.compute for u in task.units) for task in tasks]
    chains = [[Block(0, compute + move)] for compute, move in zip(computes, moves, strict=True)]
    extra = max(moves) + max(computes) if max(moves) else 0
    return _holds(chains, tasks, settings, blocking=extra)


def _least_volumes(weights: Sequence[int], need: int) -> list[int]:
    """The least equal cap on volumes with ``sum(s) - max(s) >= need``; empty if all of them are too little."""

    def enough(cap: int) -> bool:
        volumes = [min(cap, weight) for weight in weights]
        return sum(volumes) - max(volumes) >= need

    low, high = 0, max(weights)
    if not enough(high):
        return []
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return [min(low, weight) for weight in weights]


def _holds(
    chains: Sequence[Sequence[Block]], tasks: Sequence[CostedTask], settings: TasksSpec, blocking: int = 0
) -> bool:
    """The exact test of non-preemptive EDF, for jobs of these costs."""
    analysed = [
        Task(task.name, (sum(segments(chain)),), Arrival(task.spec.step), task.spec.relative_deadline)
        for chain, task in zip(chains, tasks, strict=True)
    ]
    if blocking:
        analysed.append(Task("swapping", (blocking,), Arrival(1 << 40), 1 << 40, background=True))
    if not demand_holds(analysed, supply_of(settings)):
        return False
    return edf.violation(analysed, supply_of(settings)) is None


METHODS: dict[str, Method] = {
    "narrowboat": ours,
    "pipelined, not preempted": pipelined,
    "RT-Swap's rules": rtswap,
    "whole models": whole_model,
    "demand paging": paging,
}


def admitted_share(shape: Shape, method: str, count: int, seed: int) -> float:
    """Of random sets of a shape, the share that is admitted."""
    admit = METHODS[method]
    return sum(admit(*random_set(shape, seed + k)) for k in range(count)) / count
