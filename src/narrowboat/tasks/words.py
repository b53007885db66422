"""Times and names as they are told: exactly, so that what is said can be written into a description."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 4


def format_exactly(microseconds: int) -> str:
    """To the microsecond, in the unit that reads best; ``6.063 ms``."""
    for unit, scale, digits in (("s", 1_000_000, 6), ("ms", 1000, 3)):
        if abs(microseconds) >= scale:
            return f"{microseconds / scale:.{digits}f}".rstrip("0").rstrip(".") + f" {unit}"
    return f"{microseconds} us"


def some_names(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
