"""How long the processor can be busy without a pause: the interval in which every worst case lies."""

from __future__ import annotations

from collections.abc import Sequence

from narrowboat.tasks.analysis.model import Supply, Task, total_utilisation

HORIZON = 1 << 50  # time after which a busy interval is taken to have no end
_ROUNDS = 20_000


def busy_interval(tasks: Sequence[Task], supply: Supply, extra: int = 0) -> int | None:
    """Least ``L > 0`` with ``extra`` plus all that arrives in it served; None where there is none.

    Args:
        tasks: whose arrivals count.
        supply: of the processor.
        extra: work of others that is under way at the start.
    """
    if total_utilisation(tasks) > supply.share:
        return None
    length = 1
    for _ in range(_ROUNDS):
        work = extra + sum(task.arrival.eta(length) * task.cost for task in tasks)
        needed = max(supply.time_for(work), 1)
        if needed <= length:
            return length
        if needed > HORIZON:
            return None
        length = needed
    return None
