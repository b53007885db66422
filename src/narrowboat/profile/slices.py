"""Cutting the rows of a weight into tiles: every row once, no tile larger than asked where rows allow it."""

from __future__ import annotations

from itertools import pairwise
from math import gcd, lcm

PAGE = 4096
# Matrix kernels work on so many output rows at a time. Tiles of whole multiples take the same path as the whole layer:
# measured, they give the same bits, where tiles of 4 rows differ by a rounding. The first that fits is taken.
UNITS = (64, 16, 4, 1)


def row_slices(rows: int, row_bytes: int, limit: int, *, multiple: int = 1) -> tuple[tuple[int, int], ...]:
    """Cut ``rows`` rows into slices ``(start, stop)`` of nearly equal size.

    Args:
        rows: how many there are.
        row_bytes: bytes of one row.
        limit: bytes a slice should not exceed; one of a single unit may.
        multiple: every slice but the last has a multiple of so many rows (the rows of one group of a convolution).

    Returns:
        Consecutive slices. All begin at a page boundary of the weight where that is possible within the limit, so
        that a packed file is read in place.
    """
    if rows <= 0:
        return ((0, max(rows, 0)),)
    unit = _unit(row_bytes, limit, multiple)
    units = -(-rows // unit)
    most = max(limit // (unit * row_bytes), 1) if row_bytes else units
    count = -(-units // most)
    # The last slice is among the largest, so that what is left over of a unit seldom stands alone.
    cuts = [units * i // count * unit for i in range(count)] + [rows]
    return tuple(pairwise(cuts))


def _unit(row_bytes: int, limit: int, multiple: int) -> int:
    """Rows that stay together: for whole pages and whole kernel blocks if the limit allows, else for less."""
    paged = PAGE // gcd(PAGE, row_bytes) if row_bytes else 1
    for page in (paged, 1):
        for block in UNITS:
            unit = lcm(page, block, multiple)
            if unit * row_bytes <= limit:
                return unit
    return multiple
