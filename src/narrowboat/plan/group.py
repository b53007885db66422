"""How many inputs go through each block while it is in memory (``Session.map``).

A sweep takes n inputs through the network together: reading is paid once, computing n times, and n - 1 inputs are
alive beside the one that computes. More inputs per sweep leave fewer bytes for weights, so beyond a point nothing is
gained: the smallest group that is nearly as good as the best is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from narrowboat.plan.model import Workload

MOST = 16  # inputs per sweep unless asked for: each has a thread of its own
WORTH = 0.02  # a larger group has to bring this much more throughput
IN_FLIGHT = "in flight"  # the part of a plan's fixed bytes that pays for the inputs beside the one that computes
HAND_OVER = 5e-5  # seconds from one input's thread to the next's; 20 to 100 microseconds were seen


def sweep(workload: Workload, size: int, bytes_each: int) -> Workload:
    """What the planner is given for ``size`` inputs per sweep.

    Args:
        workload: one pass of one input.
        size: inputs per sweep.
        bytes_each: what each input beyond the first has alive, in bytes.
    """
    if size == 1:
        return workload
    boundaries = {first for block in workload.blocks for first, _ in block.holds}
    extra = (size - 1) * bytes_each
    return replace(
        workload,
        step_seconds=_together(workload.step_seconds, size, boundaries),
        busy_seconds=_together(workload.busy_seconds, size, boundaries),
        fixed_bytes=workload.fixed_bytes + extra,
        fixed_parts=(*workload.fixed_parts, (IN_FLIGHT, extra)),
    )


def _together(seconds: Sequence[float], size: int, boundaries: Collection[int]) -> tuple[float, ...]:
    return tuple(size * (s + (HAND_OVER if step in boundaries else 0.0)) for step, s in enumerate(seconds))


def choose_group(sweep_seconds: Callable[[int], float | None], most: int = MOST) -> int:
    """The smallest number of inputs per sweep whose predicted throughput is within ``WORTH`` of the best.

    Args:
        sweep_seconds: predicted seconds of a sweep of so many inputs; None if the budget cannot hold them. Called
            with 1, 2, ... up to ``most``, and not beyond the first None.
    """
    rates: dict[int, float] = {}
    for size in range(1, most + 1):
        seconds = sweep_seconds(size)
        if seconds is None:
            break
        rates[size] = size / max(seconds, 1e-12)
    enough = max(rates.values(), default=0.0) * (1 - WORTH)
    return min((size for size, rate in rates.items() if rate >= enough), default=1)
