"""When the check of splitting is made again: what held for the first batch need not hold for a later one.

A mean over a mask that user code computes adds up over micro-batches as long as nothing is masked; a term of the loss
may be switched on after some steps. So the check is repeated at the 1st, 2nd, 4th, 8th ... step after the first, and
whenever samples begin to differ in something: in how much of them is padded, masked or ignored, in a length, a weight.
"""

from __future__ import annotations

from typing import Any

from narrowboat.train.sample_marks import differing, marks


class SplitWatch:
    """Of one kind of batch that is split.

    Args:
        inputs, targets: the batch on which the check was made first.

    Attributes:
        newly: the features (``sample_marks``) in which samples began to differ when the check became due.
    """

    def __init__(self, inputs: Any, targets: Any) -> None:
        self._known = differing(marks(inputs, targets))
        self._steps = 0
        self._next = 1
        self.newly: list[int] = []

    def due(self, inputs: Any, targets: Any) -> bool:
        """Whether to check before the step on this batch; to be asked once for each step."""
        self._steps += 1
        now = differing(marks(inputs, targets))
        self.newly = (now & ~self._known).nonzero().flatten().tolist()
        self._known |= now
        due = self._steps >= self._next or bool(self.newly)
        while self._next <= self._steps:
            self._next *= 2
        return due
