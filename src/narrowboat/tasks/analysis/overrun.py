"""How much work beyond what was assumed a busy interval may hold before a deadline is missed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from narrowboat.tasks.analysis.model import Supply, Task
from narrowboat.tasks.analysis.solution import Response

Analysis = Callable[[Sequence[Task], Task, Supply], Response]


def meets(tasks: Sequence[Task], supply: Supply, analysis: Analysis) -> bool:
    """Whether every task's bound is within its deadline."""
    bounds = (analysis(tasks, task, supply).bound for task in tasks)
    return all(bound is not None and bound <= task.deadline for bound, task in zip(bounds, tasks, strict=True))


def tolerated(tasks: Sequence[Task], supply: Supply, analysis: Analysis) -> int | None:
    """Most extra work in one busy interval with every deadline still met; None if none is met as it is.

    Extra work is supply that goes elsewhere (Zini et al., RTSS 2024, give the exact form for fixed priorities).
    """
    if not tasks or not meets(tasks, supply, analysis):
        return None
    low, high = 0, max(task.deadline for task in tasks)
    while low < high:
        middle = (low + high + 1) // 2
        if meets(tasks, supply.less(middle), analysis):
            low = middle
        else:
            high = middle - 1
    return low
