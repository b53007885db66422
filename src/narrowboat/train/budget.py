"""The budget in force: the user's number, or less when the machine has less.

Before each step the free memory, the cgroup's limit and the pressure are looked at (not more often than every quarter
of a second). It goes down at once and up slowly (``stream.auto.Hysteresis``), never above the number that was given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from narrowboat.errors import BudgetError, UsageError
from narrowboat.machine.memory import memory_limits
from narrowboat.quantities import format_bytes, parse_bytes
from narrowboat.stream.auto import Hysteresis, initial_budget, memory_pressure

_LOOK_EVERY = 0.25  # seconds
_UNBOUNDED = 1 << 60


class BudgetInForce:
    """A number of bytes that may change between steps.

    Args:
        value: an int, a string such as "1.5GiB", or "auto".
        adapt: follow what the machine has free.

    Attributes:
        now: bytes in force.
        given: the most there can be.
    """

    def __init__(self, value: int | str, *, adapt: bool) -> None:
        self._adapt = adapt
        self._looked = 0.0
        self.given = self.now = 0
        self.set(value)

    def set(self, value: int | str) -> None:
        """A new number, from the next step on."""
        if isinstance(value, str) and value == "auto":
            self.given, _ = initial_budget(_UNBOUNDED)
        elif isinstance(value, float) and math.isfinite(value) and value % 1:
            raise UsageError(
                f"budget={value!r} is no whole number of bytes: give an int, or a string such as '1.5GiB'"
            )
        else:
            self.given = parse_bytes(value)
        if self.given <= 0:
            raise UsageError(f"budget={value!r}: give a positive number of bytes")
        self.now = self.given
        self._hysteresis = Hysteresis(floor=1, ceiling=self.given)

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

    def follow(self, held: int, addresses: int) -> str:
        """Look at the machine; what changed in words, or "".

        Args:
            held: bytes that training holds now.
            addresses: bytes of private address space that it holds, touched or not; what limits of those count.
        """
        if not self._adapt or time.monotonic() - self._looked < _LOOK_EVERY:
            return ""
        self._looked = time.monotonic()
        rooms = memory_limits().headrooms().items()
        spare = min(room + (max(addresses, held) if name.startswith("RLIMIT") else held) for name, room in rooms)
        wanted = self._hysteresis.wanted(self.now, spare, memory_pressure())
        if wanted is None:
            return ""
        before, (self.now, cause) = self.now, wanted
        return f"budget {format_bytes(before)} -> {format_bytes(self.now)} ({cause})"
