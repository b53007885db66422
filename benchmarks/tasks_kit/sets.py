"""Random task sets of a shape: how busy the core, how much more memory than there is, how long loads take."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from narrowboat.tasks.costed import CostedTask, described
from narrowboat.tasks.spec.load import tasks_from
from narrowboat.tasks.spec.schema import TasksSpec

BUDGET = 1 << 30
_NAMES = {"utilisation": "utilisation", "demand over capacity": "demand", "load over compute": "load"}


@dataclass(frozen=True)
class Shape:
    """What random sets have in common.

    Attributes:
        tasks: in a set.
        units: into which each network can be cut.
        utilisation: of the core by computing alone.
        demand: bytes of all networks over the budget.
        load: time to load a network over the time to compute it, on average.
    """

    tasks: int = 5
    units: int = 12
    utilisation: float = 0.4
    demand: float = 1.96
    load: float = 0.5

    @staticmethod
    def varied(curve: str) -> str:
        """The field that a curve varies."""
        return _NAMES[curve]


def random_set(shape: Shape, seed: int) -> tuple[list[CostedTask], TasksSpec]:
    """One set, the same for the same seed."""
    rng = random.Random(seed)
    shares = _uunifast(rng, shape.tasks, shape.utilisation)
    sizes = _uunifast(rng, shape.tasks, shape.demand * BUDGET)
    tasks = []
    for k, (share, size) in enumerate(zip(shares, sizes, strict=True)):
        period = math.exp(rng.uniform(math.log(100_000), math.log(1_000_000)))
        compute = max(share * period, shape.units)
        ratio = shape.load * rng.uniform(0.5, 1.5)
        parts = [rng.uniform(0.5, 1.5) for _ in range(shape.units)]
        weights = [rng.uniform(0.2, 1.8) for _ in range(shape.units)]
        blocks = [
            {
                "compute": f"{max(round(compute * part / sum(parts)), 1)}us",
                "load": f"{max(round(compute * ratio * weight / sum(weights)), 1)}us",
                "bytes": max(round(size * weight / sum(weights)), 1),
            }
            for part, weight in zip(parts, weights, strict=True)
        ]
        activations = max(round(0.02 * size), 1)
        tasks.append(
            {"name": f"t{k}", "period": f"{round(period)}us", "blocks": blocks, "activation_bytes": activations}
        )
    settings = tasks_from({"budget": BUDGET, "tasks": tasks})
    return [described(spec) for spec in settings.tasks], settings


def _uunifast(rng: random.Random, count: int, total: float) -> list[float]:
    """Shares of a total, uniform over all that sum to it (Bini and Buttazzo, Real-Time Systems 30, 2005)."""
    shares, left = [], total
    for k in range(1, count):
        following = left * rng.random() ** (1 / (count - k))
        shares.append(left - following)
        left = following
    return [*shares, left]
