"""The tenants of the window, and who of them has which place in it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from narrowboat.arena.slab import PAGE
from narrowboat.arena.slot import Weight
from narrowboat.stream.blocks import State
from narrowboat.stream.reader import Job
from narrowboat.train.weights.places import Taken, find_place

_SMALL = 64 << 10  # bytes up to which a weight has a place of its own: reading it anew costs more than its bytes
_SMALL_SHARE = 8  # such weights get at most this part of the window


def page_up(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


@dataclass(eq=False, slots=True)
class Tenant:
    """A weight as the window sees it.

    Attributes:
        weight: which one.
        nbytes: bytes of the window it takes, whole pages.
        home: the place that it alone has; None for those that take turns.
        offset: where it is or will be, while it has a place.
        job: the read under way, or the last one.
        pins: operators in progress that use it.
        view: the tensor over its bytes, made when first used at this place.
        storage: what ``view`` refers to.
    """

    weight: Weight
    nbytes: int
    home: int | None = None
    offset: int = 0
    state: State = State.OUT
    job: Job | None = None
    pins: int = 0
    view: torch.Tensor | None = None
    storage: Any = None

    def __lt__(self, other: Tenant) -> bool:
        return self.offset < other.offset

    def leave(self) -> None:
        """It is out."""
        self.state = State.OUT
        self.job = self.view = self.storage = None


class Room:
    """Places for tenants between 0 and ``high``; the smallest have homes of their own at the beginning.

    Args:
        tenants: all there are.
        high: bytes.
        together: bytes that must stay for those without homes.

    Attributes:
        guests: those that have a place and no home, in order of their places.
        high: bytes; may be changed when nobody is beyond it.
        low: bytes of the homes.
        peak: most bytes that had a tenant at once, all homes counted.
    """

    def __init__(self, tenants: Iterable[Tenant], high: int, together: int) -> None:
        self._tenants = list(tenants)
        self.guests: list[Tenant] = []
        self.high = high
        self.low = self.peak = 0
        spare = min(high // _SMALL_SHARE, high - together)
        for tenant in sorted(self._tenants, key=lambda each: each.nbytes):
            if tenant.nbytes > _SMALL or self.low + tenant.nbytes > spare:
                break
            tenant.home = self.low
            self.low += tenant.nbytes

    def no_homes(self) -> None:
        """Everybody takes turns from now on; nobody may be in."""
        self.low = 0
        for tenant in self._tenants:
            tenant.home = None

    def enter(
        self,
        tenant: Tenant,
        farness: Callable[[Tenant], float],
        let_go: Callable[[Tenant], None],
        beyond: float = -1.0,
    ) -> bool:
        """Find a place for a weight; False if there is none.

        Args:
            tenant: who enters.
            farness: how far away the next use of one is.
            let_go: called with those who have to go; ``leave`` them.
            beyond: nobody goes who is needed within so many touches.
        """
        if tenant in self.guests:
            return True
        if tenant.home is not None:
            tenant.offset = tenant.home
            return True
        taken = [Taken(each.offset, each.offset + each.nbytes, farness(each)) for each in self.guests]
        place = find_place(taken, self.high, tenant.nbytes, low=self.low, beyond=beyond)
        if place is None:
            return False
        for other in self.guests[place.first : place.last]:
            let_go(other)
        tenant.offset = place.start
        insort(self.guests, tenant)
        used = self.low + sum(each.nbytes for each in self.guests)
        self.peak = max(self.peak, used)
        return True

    def leave(self, tenant: Tenant) -> None:
        """Its place is free."""
        if tenant in self.guests:
            self.guests.remove(tenant)
        tenant.leave()

    def empty(self) -> None:
        """Nobody is in."""
        self.guests.clear()
        for tenant in self._tenants:
            tenant.leave()
            tenant.pins = 0
