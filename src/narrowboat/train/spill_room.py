"""A plan that has room on storage: where the folder is full, the next best in memory."""

from __future__ import annotations

from collections.abc import Callable

from narrowboat.errors import BudgetError, SpillError
from narrowboat.train.plan import Planner, TrainPlan
from narrowboat.train.spill import SpillPool


def plan_with_room(planner: Planner, budget: int, pool: SpillPool | None, tell: Callable[[str], None]) -> TrainPlan:
    """The fastest plan that fits into the budget and whose activations fit into the folder.

    The room is taken, so that nobody else has it when the step comes. Where there is not enough, the planner plans
    without storage from now on.

    Args:
        planner: of such batches.
        budget: bytes.
        pool: where activations go; None for no storage.
        tell: is told if the folder has no room.

    Raises:
        BudgetError: no plan fits, with or without storage.
        SpillError: the folder has no room, and without it no plan fits.
    """
    plan = planner.make(budget)
    if pool is None or plan.foreseen is None or not plan.foreseen.spilled:
        return plan
    try:
        pool.ensure(plan.foreseen.spilled)
        return plan
    except SpillError as error:
        full = error
    before = planner.premises
    planner.without_storage(str(full))
    try:
        plan = planner.make(budget)
    except BudgetError as refusal:
        planner.plan_from(before)  # there may be room the next time
        raise full from refusal
    tell(f"activations stay in memory: {full}")
    return plan
