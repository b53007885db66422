"""The budget in force: the user's number, or less when the machine has less.

Before each step the machine's free memory, the cgroup's limit and the pressure are looked at, or what a device has
free, not more often than every quarter of a second. It goes down at once and up slowly (``stream.auto.Hysteresis``),
never above the number that was given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from narrowboat.errors import BudgetError, UsageError
from narrowboat.quantities import format_bytes, parse_bytes
from narrowboat.stream.auto import Hysteresis, initial_budget

_LOOK_EVERY = 0.25  # seconds
_UNBOUNDED = 1 << 60


class Follower(Protocol):
    """Decides when what could be had is worth a change of budget (``stream.auto.Hysteresis``)."""

    def wanted(self, now: int, spare: int, pressure: float) -> tuple[int, str] | None:
        """The new budget and why, or None to leave it."""
        ...


class Machine(Protocol):
    """What the budget is a part of."""

    def auto(self) -> int:
        """What "auto" stands for, in bytes."""
        ...

    def check(self, budget: int) -> None:
        """Refuse a number that cannot be."""
        ...

    def follower(self, ceiling: int) -> Follower:
        """Of a budget of so many bytes at the most."""
        ...


class Host:
    """See ``Machine``. Less than the budget may be free when it is given; then less is in force."""

    def auto(self) -> int:
        """See ``Machine``."""
        return initial_budget(_UNBOUNDED)[0]

    def check(self, budget: int) -> None:
        """See ``Machine``."""

    def follower(self, ceiling: int) -> Hysteresis:
        """See ``Machine``."""
        return Hysteresis(floor=1, ceiling=ceiling)


class BudgetInForce:
    """A number of bytes that may change between steps.

    Args:
        value: an int, a string such as "1.5GiB", or "auto".
        adapt: follow what there is.
        machine: of which it is a part; None for the host.

    Attributes:
        now: bytes in force.
        given: the most there can be.
    """

    def __init__(self, value: int | str, *, adapt: bool, machine: Machine | None = None) -> None:
        self._adapt, self._machine = adapt, machine if machine is not None else Host()
        self._looked = 0.0
        self.given = self.now = 0
        self.set(value)

    def set(self, value: int | str) -> None:
        """A new number, from the next step on."""
        if isinstance(value, str) and value == "auto":
            given = self._machine.auto()
        elif isinstance(value, float) and math.isfinite(value) and value % 1:
            raise UsageError(
                f"budget={value!r} is no whole number of bytes: give an int, or a string such as '1.5GiB'"
            )
        else:
            given = parse_bytes(value)
        if given <= 0:
            raise UsageError(f"budget={value!r}: give a positive number of bytes")
        self._machine.check(given)
        self.given = self.now = given
        self._following = self._machine.follower(given)

    @contextmanager
    def told(self) -> Iterator[None]:
        """A refusal inside says so where less is in force than was given."""
        try:
            yield
        except BudgetError as error:
            if self.now >= self.given:
                raise
            less = f"; {format_bytes(self.given)} were given, and the machine can spare no more now"
            raise BudgetError(f"{error}{less}", minimum=error.minimum, limiter=error.limiter) from error

    def lower(self, value: int) -> None:
        """Less from now on; it may grow back."""
        self.now = min(self.now, value)

    def follow(self, could_hold: Callable[[], tuple[int, float]]) -> str:
        """Look at what there is; what changed in words, or "".

        Args:
            could_hold: bytes that training could hold in all, and the percentage of time in which tasks wait for
                memory (``memory.MeasuredMemory``).
        """
        if not self._adapt or time.monotonic() - self._looked < _LOOK_EVERY:
            return ""
        self._looked = time.monotonic()
        wanted = self._following.wanted(self.now, *could_hold())
        if wanted is None:
            return ""
        before, (self.now, cause) = self.now, wanted
        return f"budget {format_bytes(before)} -> {format_bytes(self.now)} ({cause})"
