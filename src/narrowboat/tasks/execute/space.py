"""Whose blocks lie in the pool: those in use, and what is left of others until their pages are wanted."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from narrowboat.arena.pool import Extents
from narrowboat.errors import BudgetError
from narrowboat.quantities import format_bytes

_SPARE = 4 << 20  # bytes more than are too many, so that it is not a few pages each time


class Pool(Protocol):
    """A fixed number of bytes, lent in extents: see ``arena.pool.PagePool``."""

    nbytes: int
    locked: bool

    @property
    def free_bytes(self) -> int:
        """Lent to nobody."""

    def take(self, nbytes: int) -> Extents | None:
        """Extents of that many bytes; None if there are too few."""

    def give(self, extents: Extents) -> None:
        """Take extents back."""

    def resize(self, nbytes: int) -> None:
        """Have more bytes, or fewer. Raises StorageError: more is lent, or the system has no more to give."""

    def close(self) -> None:
        """Give the memory back."""


@dataclass(eq=False)
class Place:
    """The fixed addresses of one block.

    Attributes:
        name: of the block.
        slab: whose addresses.
        offset: of its first byte.
        nbytes: whole pages; on a device, whole chunks.
        extents: of the pool that back it; None while none do.
        valid: its weights' bytes are there.
        users: jobs that hold it.
        known: what the thread that loaded it knew then (``Ground.hand_over``).
    """

    name: str
    slab: Any
    offset: int
    nbytes: int
    extents: Extents | None = None
    valid: bool = False
    users: int = 0
    known: object = None

    def back(self, extents: Extents) -> None:
        """The pool lends it these."""
        self.slab.back(self.offset, extents)

    def unback(self) -> None:
        """They go back to the pool."""
        self.slab.unback(self.offset, self.nbytes)


class SwapSpace:
    """The pool, and which blocks it backs. Used by the load engine's thread only, but for the counts.

    A block that nobody uses keeps its bytes until its pages are wanted; the last one let go is given up first, as
    passes are cyclic and it will be wanted last.

    Args:
        pool: the memory.
        remember: keep what is let go; without, every use reads, which is what worst cases are measured with.

    Attributes:
        in_use: bytes that jobs hold.
        hits: uses that found their bytes still there.
        least: bytes of the pool without which jobs could not go on.
    """

    def __init__(self, pool: Pool, *, remember: bool = True) -> None:
        self.pool, self._remember = pool, remember
        self.in_use = 0
        self.hits = 0
        self.least = pool.nbytes
        self._left: OrderedDict[Place, None] = OrderedDict()

    @property
    def free_bytes(self) -> int:
        """That nobody uses."""
        return self.pool.nbytes - self.in_use

    def hold(self, place: Place) -> bool:
        """Back a block; True if its bytes are still there and need not be read.

        Raises:
            BudgetError: the pool is too small for those in use and this one.
        """
        if place.users:
            place.users += 1
            return place.valid
        if place.extents is None:
            while (extents := self.pool.take(place.nbytes)) is None:
                if not self._left:
                    raise BudgetError(
                        f"{place.name} ({format_bytes(place.nbytes)}) does not fit beside the "
                        f"{format_bytes(self.in_use)} in use of {format_bytes(self.pool.nbytes)}",
                        minimum=self.in_use + place.nbytes,
                        limiter=place.name,
                    )
                self._drop(next(reversed(self._left)))
            place.back(extents)
            place.extents, place.valid = extents, False
        self._left.pop(place, None)
        place.users = 1
        self.in_use += place.nbytes
        self.hits += place.valid
        return place.valid

    def let_go(self, place: Place) -> None:
        """A job is done with a block."""
        place.users -= 1
        if place.users == 0:
            self.in_use -= place.nbytes
            place.valid = place.valid and self._remember
            self._left[place] = None

    def resize(self, nbytes: int) -> None:
        """Have a pool of so many bytes; what is left of blocks that nobody uses goes.

        Raises:
            StorageError: more is in use.
        """
        self.forget()
        self.pool.resize(nbytes)

    def shrink(self, nbytes: int) -> None:
        """Have so many bytes less, as far as ``least`` and what is in use allow; the last ones let go stay."""
        target = max(self.pool.nbytes - nbytes - _SPARE, self.least, self.in_use) if nbytes > 0 else self.pool.nbytes
        if target >= self.pool.nbytes:
            return
        while self._left and self.pool.free_bytes < self.pool.nbytes - target:
            self._drop(next(iter(self._left)))
        self.pool.resize(max(target, self.pool.nbytes - self.pool.free_bytes))

    def forget(self) -> None:
        """Give up what is left of blocks that nobody uses."""
        while self._left:
            self._drop(next(iter(self._left)))

    def _drop(self, place: Place) -> None:
        del self._left[place]
        place.unback()
        assert place.extents is not None
        self.pool.give(place.extents)
        place.extents, place.valid = None, False
