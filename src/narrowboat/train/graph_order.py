"""The order in which backward visits micro-batches that went forward in lockstep.

Of the nodes that are ready, autograd runs the one with the highest sequence number. Each thread counts for itself,
so nodes that K threads made side by side would be run side by side, and temporaries (or replays) of K micro-batches
would be alive at once. Here the nodes are numbered anew: all of one stretch of one micro-batch, then the same stretch
of the micro-batch before it. The order changes no value, only what is alive.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

# Far above what a thread counts to; below AccumulateGrad's, which stays the highest of all.
_FIRST = 1 << 50
_NODES = 1 << 24


class BackwardOrder:
    """Numbers the nodes of ``parts`` micro-batches, stretch by stretch; a stretch ends where micro-batches meet."""

    def __init__(self, parts: int) -> None:
        self._parts = parts
        self.stretch = 0

    def number_part(self, outputs: Iterable[Tensor], part: int) -> None:
        """All not yet numbered nodes behind ``outputs`` belong to this stretch of micro-batch ``part``."""
        start = _FIRST + (self.stretch * self._parts + part) * _NODES
        _renumber(outputs, lambda old: start + old % _NODES)

    def number_meeting(self, outputs: Iterable[Tensor]) -> None:
        """The nodes that join the micro-batches come before the stretch that they end, in backward's direction."""
        self.stretch += 1
        number = _FIRST + self.stretch * self._parts * _NODES - 1
        _renumber(outputs, lambda old: number)


def _renumber(outputs: Iterable[Tensor], number: Any) -> None:
    nodes: list[Any] = [tensor.grad_fn for tensor in outputs]
    while nodes:
        node = nodes.pop()
        # A private pair of names: where a torch lacks it, backward keeps its own order.
        if node is None or not hasattr(node, "_set_sequence_nr") or node._sequence_nr() >= _FIRST:
            continue
        node._set_sequence_nr(number(node._sequence_nr()))
        nodes.extend(following for following, _ in node.next_functions)
