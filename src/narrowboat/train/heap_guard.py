"""Within a step: what the heap keeps of freed tensors goes back to the system only where a kernel needs the room.

An allocator that keeps what was freed serves the next request without a page fault, and a step under a plan makes and
frees its activations over and over (``machine.whole_heap``). But what is kept counts as resident. So before each
operator, and at each saved tensor that the backward pass asks for, the bytes that come are set against the budget;
where they would pass it, the heap's free pages are given back first (``malloc_trim``).

A kernel that asks for several blocks, frees some and asks again may find no hole that fits, and then the heap grows by
more than ever was in use. Where the budget has no room for that, its blocks are mapped one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from narrowboat.machine import whole_heap
from narrowboat.machine.memory import private_bytes
from narrowboat.train.tape.frames import Takes

_SMALL = 1 << 20  # bytes that one more trim would have to give back, or that blocks mapped one by one would save
_SMALL_SHARE = 0.03  # the same as a share of the bytes that move
_SPARE = 2 << 20  # a huge page; and the kernel's count of pages runs behind by some on each CPU
_SPARE_MOST = 0.05  # of the bytes allowed
_SPARE_SHARE = 0.08  # of the bytes that move: small tensors that nobody announces, and what pages round up


def usable(budget: int, still: int) -> int:
    """Bytes of a budget that the guard lets be filled; the rest is for what nobody announces.

    Args:
        budget: of the step.
        still: bytes of it that neither come nor go in a step (weights, optimizer state).
    """
    return budget - min(_SPARE, int(budget * _SPARE_MOST)) - int(max(0, budget - still) * _SPARE_SHARE)


class Heap(Protocol):
    """What the guard can do (``machine.whole_heap``)."""

    def open_whole_heap(self) -> bool:
        """Take everything from the heap."""
        ...

    def give_back(self) -> None:
        """Give back what is free."""
        ...

    def map_apart(self) -> None:
        """Map large blocks one by one."""
        ...


class NoHeap:
    """Where the allocator keeps nothing, there is nothing to give back."""

    def open_whole_heap(self) -> bool:
        """Nothing to do."""
        return True

    def give_back(self) -> None:
        """Nothing to do."""

    def map_apart(self) -> None:
        """Nothing to do."""


class HeapGuard:
    """Keeps one step's resident memory within a limit.

    Args:
        base: private bytes of the process without the training.
        budget: bytes beyond that the step stays within.
        still: bytes of the budget that neither come nor go in a step (weights, optimizer state).
        ceiling: bytes beyond ``base`` that no step may pass; past them it is given up. None for no such limit.
        heap, resident: the allocator's and the system's; others in tests.

    Attributes:
        trims: times the heap's free pages were given back.
        tight: times a kernel's blocks were mapped one by one.
    """

    watches = True

    def __init__(
        self,
        base: int,
        budget: int,
        ceiling: int | None = None,
        *,
        still: int = 0,
        heap: Heap | None = None,
        resident: Callable[[], int] = private_bytes,
    ) -> None:
        self.trims = self.tight = 0
        self._limit = base + usable(budget, still)
        self._small = max(_SMALL, int(max(0, budget - still) * _SMALL_SHARE))
        self._ceiling = None if ceiling is None else base + ceiling
        self._heap = heap if heap is not None else whole_heap
        self._resident = resident
        self._room = 0  # bytes that may be taken before anybody has to look
        self._left = 0  # resident after the last trim, which the next one cannot give back either
        self._apart = False

    def before(self, takes: Takes) -> None:
        """So much is about to be taken.

        Raises:
            MemoryError: even with the heap's free pages given back it would pass the ceiling.
        """
        if not takes.turnover:
            return  # of one kernel's tensors the last announces what it takes
        if self._apart:
            self._heap.open_whole_heap()
            self._apart, self._room = False, 0
        self._room -= takes.turnover
        if self._room >= 0:
            return
        held = self._resident()
        if held + takes.turnover > self._limit and held - self._left >= self._small:
            self._heap.give_back()
            self.trims += 1
            self._left = held = self._resident()
        if self._ceiling is not None and held + takes.highest > self._ceiling:
            raise MemoryError(
                f"out of memory: {held + takes.highest - self._ceiling} bytes beyond what a step may take"
            )
        if held + takes.turnover > self._limit and takes.turnover - takes.highest >= self._small:
            self._heap.map_apart()
            self._apart = True
            self.tight += 1
        self._room = self._limit - held - takes.turnover

    def end(self, nbytes: int) -> None:
        """The passes are over; so many bytes are taken for the optimizer's step."""
        self.before(Takes(nbytes, nbytes))
