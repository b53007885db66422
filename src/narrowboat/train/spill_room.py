"""A plan that has room on storage: where the folder is full, the next best in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from narrowboat.errors import BudgetError, NarrowboatError, PinnedMemoryError, SpillError, StorageError
from narrowboat.train.plan import Planner, TrainPlan


class Pool(Protocol):
    """Where activations go (``spill.SpillPool``, ``device.spill.DeviceSpillPool``)."""

    def ensure(self, nbytes: int) -> None:
        """Have so many bytes at hand."""
        ...


def plan_with_room(planner: Planner, budget: int, pool: Pool | None, tell: Callable[[str], None]) -> TrainPlan:
    """The fastest plan that fits into the budget and whose activations fit where they are spilled.

    The room is taken, so that nobody else has it when the step comes. Where a folder has not enough, the planner plans
    without storage from now on; where the host's memory cannot be pinned, without spilling.

    Args:
        planner: of such batches.
        budget: bytes.
        pool: where activations go; None for nowhere.
        tell: is told if there is no room.

    Raises:
        BudgetError: no plan fits, with or without storage.
        SpillError: the folder has no room, and without it no plan fits.
        PinnedMemoryError, StorageError: likewise of pinned memory.
    """
    plan = planner.make(budget)
    before = planner.premises
    while pool is not None and plan.foreseen is not None and plan.foreseen.spilled:
        try:
            pool.ensure(plan.at_once)
            return plan
        except StorageError as error:
            full: NarrowboatError = error
            # Of the folder; if there is none, or it is the host that has no memory, nothing is left to spill to.
            left = isinstance(error, SpillError) and planner.premises.rates.write is not None
        except PinnedMemoryError as error:
            full, left = error, False
        (planner.without_storage if left else planner.without_host)(str(full))
        try:
            plan = planner.make(budget)
        except BudgetError as refusal:
            planner.plan_from(before)  # there may be room the next time
            raise full from refusal
        what = "less of the activations is spilled" if planner.premises.rates.levels else "activations stay in memory"
        tell(f"{what}: {full}")
    return plan
