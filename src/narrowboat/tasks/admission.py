"""Will every deadline hold, and does it fit? The answer, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from narrowboat.quantities import format_bytes
from narrowboat.tasks.analysis import edf, fp
from narrowboat.tasks.analysis.memory import MemoryNeed, need
from narrowboat.tasks.analysis.model import Supply, Task, total_utilisation
from narrowboat.tasks.analysis.overrun import tolerated
from narrowboat.tasks.analysis.solution import Response
from narrowboat.tasks.costed import CostedTask, always_bytes, analysis_task, footprint_of, priorities
from narrowboat.tasks.spec.schema import TasksSpec
from narrowboat.tasks.words import format_exactly, some_names

DEFAULT_CHUNK = 1000  # microseconds of one read, where storage was not measured


@dataclass(frozen=True)
class TaskVerdict:
    """What was found for one task. Times in microseconds.

    Attributes:
        name: of the task.
        guaranteed: whether its deadlines are asked to be promised.
        admitted: whether they hold (best effort: always).
        response: the analysis; its bound is None where there is none.
        deadline: relative.
        cost: worst time of one job alone.
        longest: longest time it is not preempted.
        utilisation: of the processor.
        blocks: into which its jobs are cut.
        pinned_bytes: of its weights that stay.
        running_bytes: while it runs, beside those.
    """

    name: str
    guaranteed: bool
    admitted: bool
    response: Response
    deadline: int
    cost: int
    longest: int
    utilisation: float
    blocks: int
    pinned_bytes: int
    running_bytes: int

    @property
    def bound(self) -> int | None:
        """Worst response; None for best effort and where there is none."""
        return self.response.bound


@dataclass(frozen=True)
class Verdict:
    """The whole answer.

    Attributes:
        admitted: everything guaranteed holds, and the memory suffices.
        memory: the worst instant.
        needed_bytes: at that instant, fixed parts included.
        budget: bytes there are.
        tasks: one by one.
        reasons: why not; empty if admitted.
        suggestions: what would admit it, each checked by the same analysis.
        tolerance: microseconds of extra work in a busy interval that all deadlines bear; None if not admitted.
        utilisation: of all tasks that are guaranteed.
        policy: "edf" or "fp".
        preemption: "lp-keep" or "np".
        supply: of the processor.
    """

    admitted: bool
    memory: MemoryNeed
    needed_bytes: int
    budget: int
    tasks: tuple[TaskVerdict, ...]
    reasons: tuple[str, ...]
    suggestions: tuple[str, ...] = ()
    tolerance: int | None = None
    utilisation: float = 0.0
    policy: str = "edf"
    preemption: str = "lp-keep"
    supply: Supply = field(default_factory=Supply)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "admitted": self.admitted,
            "memory": {
                "needed_bytes": self.needed_bytes,
                "budget_bytes": self.budget,
                "pinned_bytes": self.memory.pinned,
                "running": self.memory.running,
                "kept": list(self.memory.kept),
                "by_task": dict(self.memory.by_task),
            },
            "tasks": [
                {
                    "name": task.name,
                    "guarantee": "guaranteed" if task.guaranteed else "best-effort",
                    "admitted": task.admitted,
                    "response_bound_us": task.bound,
                    "deadline_us": task.deadline,
                    "cost_us": task.cost,
                    "longest_segment_us": task.longest,
                    "utilisation": round(task.utilisation, 6),
                    "blocks": task.blocks,
                    "pinned_bytes": task.pinned_bytes,
                    "running_bytes": task.running_bytes,
                    "blocking_us": task.response.blocking,
                    "blocked_by": task.response.blocker or None,
                    "interference_us": dict(task.response.interference),
                }
                for task in self.tasks
            ],
            "reasons": list(self.reasons),
            "suggestions": list(self.suggestions),
            "overrun_tolerance_us": self.tolerance,
            "utilisation": round(self.utilisation, 6),
            "policy": self.policy,
            "preemption": self.preemption,
            "supply": {"share": float(self.supply.share), "delay_us": self.supply.delay},
        }


def supply_of(settings: TasksSpec) -> Supply:
    """What the description says of the processor."""
    return Supply.of(settings.supply.share, settings.supply.delay)


def analysis_tasks(tasks: Sequence[CostedTask], settings: TasksSpec, chunk: int = DEFAULT_CHUNK) -> list[Task]:
    """All tasks as the analysis sees them."""
    levels = priorities(tasks)
    return [analysis_task(task, settings, levels[task.name], chunk) for task in tasks]


def responses(tasks: Sequence[Task], settings: TasksSpec) -> list[Response]:
    """The bounds of all tasks; of those in the background none."""
    supply, room = supply_of(settings), {"edf": edf, "fp": fp}[settings.policy]
    found = [Response(t.name, None) if t.background else room.response(tasks, t, supply) for t in tasks]
    # Where the demand test holds every deadline is met: it can be the sharper of the two.
    late = any(_late(task, each) for task, each in zip(tasks, found, strict=True))
    if settings.policy == "edf" and late and demand_holds(tasks, supply):
        found = [
            Response(each.task, task.deadline, each.offset, each.blocking, each.blocker, each.interference)
            if _late(task, each)
            else each
            for task, each in zip(tasks, found, strict=True)
        ]
    return found


def _late(task: Task, response: Response) -> bool:
    return not task.background and (response.bound is None or response.bound > task.deadline)


def demand_holds(tasks: Sequence[Task], supply: Supply) -> bool:
    """The demand test of EDF."""
    try:
        return edf.violation(tasks, supply) is None
    except OverflowError:
        return False


def schedulable(tasks: Sequence[Task], settings: TasksSpec) -> bool:
    """Only whether every deadline that is promised holds; quicker than the bounds."""
    supply = supply_of(settings)
    if settings.policy == "edf" and demand_holds(tasks, supply):
        return True
    room = {"edf": edf, "fp": fp}[settings.policy]
    return all(not _late(t, room.response(tasks, t, supply)) for t in tasks if not t.background)


def memory_need(tasks: Sequence[CostedTask], settings: TasksSpec) -> tuple[MemoryNeed, int]:
    """The worst instant, and its bytes with what is held all the time."""
    levels = priorities(tasks)
    found = need(
        [footprint_of(task, settings, levels[task.name]) for task in tasks], keep=settings.preemption == "lp-keep"
    )
    return found, found.nbytes + always_bytes(tasks, keep=settings.preemption == "lp-keep")


def admit(tasks: Sequence[CostedTask], settings: TasksSpec, chunk: int = DEFAULT_CHUNK) -> Verdict:
    """Judge a set as it is: with these blocks, these pins, this budget.

    Args:
        tasks: with what they cost.
        settings: policy, budget, supply.
        chunk: microseconds of one read, which a prefetch that is given up may still take.
    """
    analysed = analysis_tasks(tasks, settings, chunk)
    found = responses(analysed, settings)
    levels = priorities(tasks)
    memory, needed = memory_need(tasks, settings)
    verdicts = []
    for costed, task, response in zip(tasks, analysed, found, strict=True):
        part = footprint_of(costed, settings, levels[costed.name])
        verdicts.append(
            TaskVerdict(
                costed.name,
                costed.spec.guaranteed,
                not _late(task, response),
                response,
                task.deadline,
                task.cost,
                task.longest,
                float(task.utilisation),
                len(costed.blocks()),
                costed.pinned_bytes,
                part.running,
            )
        )
    reasons = _reasons(verdicts, analysed, memory, needed, settings)
    admitted = not reasons
    supply = supply_of(settings)
    promised = [task for task in analysed if not task.background]
    return Verdict(
        admitted,
        memory,
        needed,
        settings.budget,
        tuple(verdicts),
        tuple(reasons),
        tolerance=_tolerance(analysed, settings, supply) if admitted else None,
        utilisation=float(total_utilisation(promised)),
        policy=settings.policy,
        preemption=settings.preemption,
        supply=supply,
    )


def _tolerance(tasks: Sequence[Task], settings: TasksSpec, supply: Supply) -> int | None:
    def meets(left: Supply) -> bool:
        if settings.policy == "edf":  # asks nothing else, and is quicker than the bounds
            return demand_holds(tasks, left)
        return all(not _late(task, fp.response(tasks, task, left)) for task in tasks if not task.background)

    return tolerated(supply, max(task.deadline for task in tasks), meets)


def _reasons(
    verdicts: Sequence[TaskVerdict], tasks: Sequence[Task], memory: MemoryNeed, needed: int, settings: TasksSpec
) -> list[str]:
    """Each in one sentence: which task, at which instant, whose demand, whose blocking, which bytes."""
    reasons = []
    if needed > settings.budget:
        kept = f" while {some_names(memory.kept)} keep a block each" if memory.kept else ""
        reasons.append(
            f"memory: {format_bytes(needed)} are needed when {memory.running} runs{kept}, and the budget is "
            f"{format_bytes(settings.budget)}: {format_bytes(needed - settings.budget)} too little"
        )
    supply = supply_of(settings)
    utilisation = total_utilisation([task for task in tasks if not task.background])
    if utilisation > supply.share:
        busiest = max((t for t in tasks if not t.background), key=lambda t: t.utilisation)
        reasons.append(
            f"overload: the tasks need {_share(utilisation)} of the core and {_share(supply.share)} of it is "
            f"there; {busiest.name} alone needs {_share(busiest.utilisation)}"
        )
        return reasons
    late = [verdict for verdict in verdicts if not verdict.admitted]
    if not late:
        return reasons
    if settings.policy == "edf":
        try:
            violation = edf.violation(tasks, supply)
        except OverflowError:
            violation = None
            reasons.append(
                "overload: the guaranteed tasks leave no time in which a block of a best-effort one could end"
            )
        if violation is not None:
            blocking = (
                f", and a block of {violation.blocker} that has begun takes {format_exactly(violation.blocking)}"
                if violation.blocking
                else ""
            )
            reasons.append(
                f"demand: within {format_exactly(violation.instant)} work of {format_exactly(violation.demand)} is "
                f"due{blocking}; "
                f"the core gives {format_exactly(violation.supply)}"
            )
    for verdict in late:
        response = verdict.response
        if response.bound is None:
            reasons.append(f"{verdict.name}: its response has no bound: more work may arrive than is served")
            continue
        parts = [f"{format_exactly(verdict.cost)} of its own"]
        if response.blocking:
            parts.append(f"{format_exactly(response.blocking)} of a block of {response.blocker} that has begun")
        parts += [f"{format_exactly(work)} of {name}" for name, work in response.interference.items() if work]
        reasons.append(
            f"{verdict.name}: may take {format_exactly(response.bound)}, its deadline is "
            f"{format_exactly(verdict.deadline)}: " + ", ".join(parts)
        )
    return reasons


def _share(share: Fraction) -> str:
    """Rounded up: what is too much is never shown as just enough."""
    return f"{math.ceil(share * 10_000) / 100:g}%"
