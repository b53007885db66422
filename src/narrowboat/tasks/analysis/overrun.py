"""How much work beyond what was assumed a busy interval may hold before a deadline is missed."""

from __future__ import annotations

from collections.abc import Callable

from narrowboat.tasks.analysis.model import Supply


def tolerated(supply: Supply, most: int, meets: Callable[[Supply], bool]) -> int | None:
    """Most extra work in one busy interval with every deadline still met; None if they are not met without any.

    Extra work is supply that goes elsewhere (Zini et al., RTSS 2024, give the exact form for fixed priorities).

    Args:
        supply: of the processor.
        most: no more than this is asked for.
        meets: whether every deadline is met with a supply; once not, never with less.
    """
    if not meets(supply):
        return None
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if meets(supply.less(middle)):
            low = middle
        else:
            high = middle - 1
    return low
