"""A model's own calls, stopped at block boundaries until the dispatcher lets them go on.

Stands where ``stream.engine`` stands for a model that runs alone: every entry to and exit from a module is an event,
and the traced order says at which events a block begins.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from narrowboat.arena.slot import Slot, Weight
from narrowboat.errors import StreamedModelError
from narrowboat.profile.use_trace import ENTER, EXIT, Event


class JobEnded(BaseException):
    """The job is to end here: over its budget, or the run is over. Not an Exception: models must not catch it."""


def described(error: BaseException) -> str:
    """The cause of a job's end, in one line."""
    return "it was ended" if isinstance(error, JobEnded) else f"{type(error).__name__}: {error}"


class Gate:
    """The events of one model.

    Args:
        events: the traced order.
        weights: all of the model's.
        at_boundary: called with the number of the block that begins, before its first step; returns when it may.

    Attributes:
        lock, depth, crew, torn: what the wrappers of ``stream.wrap`` look at.
    """

    def __init__(self, events: Sequence[Event], weights: Sequence[Weight], at_boundary: Callable[[int], None]) -> None:
        self.lock = nullcontext()  # one job computes at a time, and two may be on their way through one network
        self.crew = None
        self.torn = False
        self._events = list(events)
        self._begins: dict[int, int] = {}
        self._at_boundary = at_boundary
        self._of = threading.local()
        for weight in weights:
            weight.owner = self

    @property
    def depth(self) -> int:
        """How many wrapped calls are in progress in this thread."""
        return getattr(self._of, "depth", 0)

    @depth.setter
    def depth(self, depth: int) -> None:
        self._of.depth = depth

    def cut(self, first_steps: Sequence[int]) -> None:
        """Blocks begin at these steps of the traced order, the first at 0."""
        self._begins = {step: block for block, step in enumerate(first_steps)}

    def enter(self, number: int, depth: int) -> None:
        """A module's forward begins."""
        if depth == 0:
            self._of.pos = -1
        self.depth = depth + 1
        self._event((number, ENTER))

    def leave(self, number: int, depth: int, *, failed: bool = False) -> None:
        """A module's forward has ended, or failed."""
        self.depth = depth
        if not failed:
            self._event((number, EXIT))

    def _event(self, event: Event) -> None:
        pos = self._of.pos = self._of.pos + 1
        if pos >= len(self._events) or self._events[pos] != event:
            raise StreamedModelError(
                "the job left the order in which its model was traced: a task's path must not depend on its input"
            )
        block = self._begins.get(pos)
        if block is not None:
            self._at_boundary(block)

    @contextmanager
    def touching(self, weights: list[Weight]) -> Iterator[Callable[[Slot], Any]]:
        """An operator has met a weight that is out: it is used outside its block.

        Raises:
            StreamedModelError: unless it is asked for no weight at all.
        """
        if weights:
            raise StreamedModelError(
                f"weight {weights[0].name!r} was used outside its block: a task's path must not depend on its input"
            )
        yield lambda slot: slot.view
