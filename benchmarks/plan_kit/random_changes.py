"""Which budget comes into force before which pass."""

from __future__ import annotations

import random


def changes(lowest: int, highest: int, passes: int, count: int, seed: int = 0) -> dict[int, int]:
    """``{pass number: budget in bytes}``: ``count`` different passes, budgets spread evenly on a logarithmic scale."""
    chance = random.Random(seed)
    where = sorted(chance.sample(range(1, passes), count))
    return {number: int(lowest * (highest / lowest) ** chance.random()) for number in where}
