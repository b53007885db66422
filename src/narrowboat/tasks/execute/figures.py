"""What a run is told in figures."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence


def spread(values: Sequence[int]) -> Mapping[str, int]:
    """How many, the median, the 99th percentile and the largest."""
    if not values:
        return {"n": 0}
    ordered = sorted(values)
    return {
        "n": len(ordered),
        "median": ordered[len(ordered) // 2],
        "p99": ordered[min(int(len(ordered) * 0.99), len(ordered) - 1)],
        "max": ordered[-1],
    }


def major_faults() -> int:
    """Pages of this process that were read back from storage, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
