"""Latency against budget: the Pareto front, its knee, and the smallest budget for a latency.

A budget is worth its bytes only if no smaller one predicts as short a pass. The knee is where more bytes stop buying
much: the point farthest from the straight line between the front's ends, both axes scaled to 1.

Source: V. Satopaa et al., "Finding a 'Kneedle' in a Haystack", ICDCS Workshops 2011.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from narrowboat.plan.model import PAGE
from narrowboat.plan.result import Plan


def budgets(least: int, enough: int, count: int) -> list[int]:
    """``count`` budgets in bytes from ``least`` to ``enough``, each the same factor over the one before."""
    if enough <= least or count < 2:
        return [least]
    factor = (enough / least) ** (1 / (count - 1))
    inner = {int(least * factor**i) // PAGE * PAGE for i in range(1, count - 1)}
    return sorted({least, *(b for b in inner if least < b < enough), enough})


def front(plans: Iterable[Plan]) -> list[Plan]:
    """The plans that no other beats in both budget and predicted latency, smallest budget first."""
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda p: (p.budget, p.predicted_latency)):
        if not kept or plan.predicted_latency < kept[-1].predicted_latency * (1 - 1e-9):
            kept.append(plan)
    return kept


def knee(points: Sequence[Plan]) -> Plan | None:
    """The plan of a front after which more bytes buy little; None if it has no bend (fewer than three plans)."""
    if len(points) < 3:
        return None
    first, last = points[0], points[-1]
    width = last.budget - first.budget
    height = first.predicted_latency - last.predicted_latency
    return max(
        points[1:-1],
        key=lambda p: (first.predicted_latency - p.predicted_latency) / height - (p.budget - first.budget) / width,
    )


def smallest_for(target: float, points: Sequence[Plan], plan_for: Callable[[int], Plan]) -> Plan | None:
    """The plan with the smallest budget that predicts at most ``target`` seconds; None if none does.

    Args:
        target: seconds per pass.
        points: a front.
        plan_for: makes the plan for a budget in bytes; asked between two points of the front, by halving, down to
            half a percent of the budget.
    """
    met = next((p for p in points if p.predicted_latency <= target), None)
    if met is None:
        return None
    low = max((p.budget for p in points if p.budget < met.budget), default=met.budget)
    while met.budget - low > max(met.budget // 200, PAGE):
        middle = (low + met.budget) // 2 // PAGE * PAGE
        if middle <= low:
            break
        tried = plan_for(middle)
        if tried.predicted_latency <= target:
            met = tried
        else:
            low = middle
    return met
