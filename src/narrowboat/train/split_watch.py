"""When the check of splitting is made again: what held for the first batch need not hold for a later one.

A mean over a mask that user code computes adds up over micro-batches as long as nothing is masked; a term of the loss
may be switched on after some steps. So the check is repeated at the 1st, 2nd, 4th, 8th ... step after the first, and
whenever samples begin to differ in how much of them is padded or ignored.
"""

from __future__ import annotations

from typing import Any

from narrowboat.train.split_check import marks


class SplitWatch:
    """Of one kind of batch that is split.

    Args:
        inputs, targets: the batch on which the check was made first.
    """

    def __init__(self, inputs: Any, targets: Any) -> None:
        self._uneven = _uneven(inputs, targets)
        self._steps = 0
        self._next = 1

    def due(self, inputs: Any, targets: Any) -> bool:
        """Whether to check before the step on this batch; to be asked once for each step."""
        self._steps += 1
        uneven = _uneven(inputs, targets)
        due = self._steps >= self._next or (uneven and not self._uneven)
        self._uneven |= uneven
        while self._next <= self._steps:
            self._next *= 2
        return due


def _uneven(inputs: Any, targets: Any) -> bool:
    found = marks(inputs, targets)
    return bool((found != found[:1]).any())
