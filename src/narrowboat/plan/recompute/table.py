"""One table per chain: the fastest schedule of every budget up to a limit, and the least budget that has one."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from narrowboat.errors import BudgetError
from narrowboat.plan.recompute.chain import Chain
from narrowboat.plan.recompute.programme import FloatArray, Programme
from narrowboat.plan.recompute.schedule import Kept, Schedule, count
from narrowboat.quantities import format_bytes

_SLOTS_PER_UNIT = 4  # rounding up costs a unit's item a slot at most: so a quarter of the budget at the very most


def solve(chain: Chain, limit: int, slots: int = 500, *, segments: bool = True) -> Table:
    """The fastest schedules of a chain in every budget up to a limit.

    Where nothing fits into the limit, the table is that of the least budget instead: ``minimum`` says it, and
    ``best`` refuses the limit with it. Any limit from ``minimum`` on has a schedule.

    Args:
        chain: what to schedule.
        limit: bytes, beyond what the caller holds anyway.
        slots: the budget is counted in at least as many parts and in fewer than twice as many, or in bytes.
        segments: whether units may be dropped and run again; otherwise they only have their options.
    """
    slots = max(slots, _SLOTS_PER_UNIT * len(chain.units))
    table = Table(chain, limit, slots, segments=segments)
    return table if table.feasible else _narrow(chain, slots, segments)


class Table:
    """Schedules of one chain by budget; made by ``solve``.

    Attributes:
        chain: what is scheduled.
        limit: bytes, the largest budget in the table.
        segments: whether units may be dropped and run again.
        slot: bytes in which budgets are counted, a power of two. So the slots of a larger limit are made of whole
            slots of a smaller one, and what fits in those fits in these: no limit between a table's minimum and its
            own limit is refused.
    """

    def __init__(self, chain: Chain, limit: int, slots: int, *, segments: bool = True) -> None:
        self.chain, self.limit, self.segments = chain, max(limit, 0), segments
        self.slot = 1 << max((self.limit // slots).bit_length() - 1, 0)
        self._programme = Programme(chain, self.slot, self.limit // self.slot, segments=segments)

    @property
    def seconds(self) -> FloatArray:
        """Least seconds by slots, shape (limit // slot + 1,); infinite where nothing fits."""
        return self._programme.seconds

    @property
    def feasible(self) -> bool:
        """Whether any budget in the table has a schedule."""
        return bool(np.isfinite(self.seconds[-1]))

    @cached_property
    def minimum(self) -> int:
        """The least budget with a schedule, in bytes, a whole number of slots."""
        return int(np.argmax(np.isfinite(self.seconds))) * self.slot

    @cached_property
    def bottleneck(self) -> str:
        """The name of the unit that is at work when the least budget is full."""
        items = self._programme.schedule(self.minimum // self.slot)
        return self.chain.units[count(self.chain, items).unit].name

    def best(self, budget: int) -> Schedule:
        """The fastest schedule in a budget of so many bytes; one larger than the limit is taken for the limit.

        Raises:
            BudgetError: nothing fits; with the minimum and the unit that sets it.
        """
        if budget < self.minimum:
            means = "with all recomputing that helps" if self.segments else "as no unit may be recomputed"
            raise BudgetError(
                f"the activations of a step do not fit into {format_bytes(budget)}: {self.bottleneck} needs "
                f"{format_bytes(self.minimum)}, {means}; "
                "raise the budget or make the batch smaller",
                minimum=self.minimum,
                limiter=self.bottleneck,
            )
        items = self._programme.schedule(min(budget, self.limit) // self.slot)
        found = count(self.chain, items)
        return Schedule(found.seconds, found.peak, items)


def frontier(table: Table) -> list[tuple[int, float]]:
    """Time against memory: every budget (bytes) from which a faster schedule fits, with its seconds."""
    points: list[tuple[int, float]] = []
    for slots, seconds in enumerate(table.seconds.tolist()):
        if np.isfinite(seconds) and (not points or seconds < points[-1][1]):
            points.append((slots * table.slot, seconds))
    return points


def _narrow(chain: Chain, slots: int, segments: bool) -> Table:
    """The table of the least budget, in slots that fit it: the same whatever limit was asked for."""
    everything = count(chain, [Kept(unit) for unit in range(len(chain.units))])
    table = Table(chain, 2 * everything.peak, slots, segments=segments)
    while table.slot > 1:
        limit = min(table.minimum, slots * table.slot - 1)  # the latter has slots half the size
        finer = Table(chain, limit, slots, segments=segments)
        if not finer.feasible:
            break
        table = finer
    return table
