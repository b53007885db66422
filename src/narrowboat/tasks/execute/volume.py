"""Swapping by volume, as RT-Swap does: of a block goes out as much as others need, and all of it comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from narrowboat.errors import BudgetError, UsageError
from narrowboat.quantities import format_bytes
from narrowboat.tasks.execute.device_place import DevicePlace
from narrowboat.tasks.execute.space import Place, Pool


@dataclass(frozen=True)
class Move:
    """One order.

    Attributes:
        nbytes: whole chunks.
        inward: swap in; otherwise out.
    """

    nbytes: int
    inward: bool


def move(asked: Move, place: Place | None, pool: Pool, bring: Callable[[], object]) -> None:
    """Carry an order out. Weights do not change: to swap them out is to unmap them.

    Args:
        asked: the order.
        place: of the block.
        pool: what is in is lent by it.
        bring: copies in what is out of the block.

    Raises:
        UsageError: the block is not on a device.
        BudgetError: more would come in than there is room for.
        NarrowboatError: loading failed; what was out is out.
    """
    if not isinstance(place, DevicePlace):
        raise UsageError("only a block on a device can be swapped by volume")
    if not asked.inward:
        going = min(asked.nbytes, place.nbytes - place.out)
        place.let_out(place.out, place.out + going)
        place.out += going
        pool.give([(0, going)])
        return
    lent = pool.take(place.out)
    if lent is None:
        raise BudgetError(
            f"{place.name} ({format_bytes(place.out)}) does not fit beside what is in of {format_bytes(pool.nbytes)}",
            minimum=pool.nbytes - pool.free_bytes + place.out,
            limiter=place.name,
        )
    try:
        place.known = bring()
    except BaseException:
        pool.give(lent)
        raise
    place.out = 0
