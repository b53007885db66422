"""Bytes and durations: parse what a person writes, print what a person reads.

Byte sizes follow accelerate's grammar: an int, or a number with a decimal unit (``"300MB"``) or a
binary one (``"300MiB"``).
"""

from __future__ import annotations

import math
import re
from numbers import Integral

from narrowboat.errors import QuantityError

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_TIME_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "min": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-zµ]*)\s*")


def parse_bytes(value: int | float | str, *, what: str = "budget") -> int:
    """Return ``value`` in bytes.

    Args:
        value: an int (bytes), a whole float, or a string such as ``"300MiB"``, ``"1.5GB"``, ``"4096"``.
        what: the name used in the error message.

    Raises:
        QuantityError: not a size, not finite, negative, or zero.
    """
    if isinstance(value, bool) or not isinstance(value, (Integral, float, str)):
        raise QuantityError(
            f"{what} {value!r} is not a byte size: give an int, or a string such as '300MiB' or '1.5GB'"
        )
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        unit = match.group(2).lower() if match else None
        if match is None or unit not in _BYTE_UNITS:
            raise QuantityError(
                f"{what} {value!r} is not a byte size: give a number with one of B, KB, MB, GB, TB (decimal) "
                "or KiB, MiB, GiB, TiB (binary), such as '300MiB'"
            )
        number = float(match.group(1)) * _BYTE_UNITS[unit]
    else:
        number = float(value)
    if not math.isfinite(number) or number < 1:
        raise QuantityError(f"{what} {value!r} must be a finite size of at least one byte")
    return int(value) if isinstance(value, Integral) else round(number)


def format_bytes(count: float) -> str:
    """``count`` bytes in binary units with three significant digits, e.g. ``'243 MiB'``."""
    sign, size = ("-", -count) if count < 0 else ("", count)
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1023.5:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or size >= 99.95 else (1 if size >= 9.995 else 2)
    return f"{sign}{size:.{digits}f} {unit}"


def format_apart(first: float, second: float) -> tuple[str, str]:
    """Two sizes as :func:`format_bytes` writes them, with the bytes where they would look the same and are not."""
    told = format_bytes(first), format_bytes(second)
    if first == second or told[0] != told[1]:
        return told
    return f"{told[0]} ({first:,} bytes)", f"{told[1]} ({second:,} bytes)"


def parse_seconds(value: int | float | str, *, what: str = "duration") -> float:
    """Return ``value`` in seconds; a bare number is seconds, a string may carry ns, us, ms, s, min or h.

    Raises:
        QuantityError: not a duration, not finite, or negative.
    """
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match is None or match.group(2).lower() not in _TIME_UNITS:
            raise QuantityError(
                f"{what} {value!r} is not a duration: give a number with ns, us, ms, s, min or h, such as '33ms'"
            )
        number = float(match.group(1)) * _TIME_UNITS[match.group(2).lower()]
    elif isinstance(value, bool) or not isinstance(value, (Integral, float)):
        raise QuantityError(
            f"{what} {value!r} is not a duration: give a number of seconds, or a string such as '33ms'"
        )
    else:
        number = float(value)
    if not math.isfinite(number) or number < 0:
        raise QuantityError(f"{what} {value!r} must be finite and not negative")
    return number


def format_seconds(seconds: float) -> str:
    """``seconds`` with a fitting unit, e.g. ``'12.3 ms'``."""
    for scale, unit in ((1e9, "ns"), (1e6, "us"), (1e3, "ms"), (1.0, "s")):
        if abs(seconds) * scale < 999.5:  # from there on three digits would be 1e+03
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds:.0f} s"
