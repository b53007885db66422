"""The prefetcher: reads for the coming uses, in their order, as far as addresses are free.

It walks the traced order cyclically, past the end of the pass into the next. A use it has provided for is a *claim*
on its block: a claimed block is not evicted until that use has come.
"""

from __future__ import annotations

import sys
from bisect import bisect_left

from narrowboat.stream.blocks import BlockState, State
from narrowboat.stream.swap import Swapper

Hold = tuple[int, int, BlockState]  # first step, last step, block


class Prefetcher:
    """Runs ahead of the model along the order of uses.

    Args:
        swapper: moves the blocks.

    Attributes:
        order: the uses of one pass, by first step.
        begins: the uses that begin at each step.
        turns: the steps at which a use begins or has just ended.
        wraps: reading goes on past the end of a pass, into the next.
    """

    wraps = True

    def __init__(self, swapper: Swapper) -> None:
        self._swapper = swapper
        self.arrange([])

    def arrange(self, holds: list[Hold]) -> None:
        """Walk along ``holds`` from now on, from their start. No claims may be open."""
        self.order = holds
        self.begins: dict[int, list[Hold]] = {}
        for hold in holds:
            self.begins.setdefault(hold[0], []).append(hold)
        self.turns = {first for first, _, _ in holds} | {last + 1 for _, last, _ in holds}
        self._firsts = [first for first, _, _ in holds]
        self._head = 0  # uses begun, counted over passes
        self._cursor = 0  # uses provided for

    def next_begin(self, step: int) -> int:
        """The first step from ``step`` on at which a use begins; beyond every step if none does."""
        at = bisect_left(self._firsts, step)
        return self._firsts[at] if at < len(self._firsts) else sys.maxsize

    def consume(self, block: BlockState) -> None:
        """The next use of the order, one of ``block``, begins."""
        if self._head < self._cursor:
            block.claims -= 1
        else:
            self._cursor += 1
        self._head += 1

    def advance(self) -> None:
        """Submit reads as far ahead as free addresses allow, at most one pass, or to its end."""
        order = self.order
        count = len(order)
        limit = self._head + count if self.wraps or not count else -(-self._head // count) * count
        while self._cursor < limit:
            block = order[self._cursor % count][2]
            if block.state is State.OUT and block.pins == 0:
                for other in block.meets:
                    if other.claims == 0:
                        self._swapper.settle(other)
                    if other.state is not State.OUT and not other.idle:
                        return
                for other in block.meets:
                    self._swapper.evict(other)
                self._swapper.submit(block)
            block.claims += 1
            self._cursor += 1

    @property
    def at_start(self) -> bool:
        """Whether the next use is the first of a pass."""
        return not self.order or self._head % len(self.order) == 0

    def unclaim(self) -> None:
        """Take back every claim; ``advance`` makes them anew."""
        count = len(self.order)
        while self._cursor > self._head:
            self._cursor -= 1
            self.order[self._cursor % count][2].claims -= 1

    def rewind(self) -> None:
        """The next use is the first of a pass."""
        self.unclaim()
        self._head = self._cursor = 0

    def jump(self, step: int) -> list[Hold]:
        """The next use is the first that begins at ``step`` or later; returns the uses held over it."""
        self.unclaim()
        self._head = self._cursor = bisect_left(self._firsts, step)
        return [hold for hold in self.order[: self._head] if hold[0] < step <= hold[1]]
