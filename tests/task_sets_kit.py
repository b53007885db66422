"""Sets of tasks that are described by blocks."""

from __future__ import annotations

from typing import Any

from narrowboat.tasks.conform import conform
from narrowboat.tasks.record import Record

MB = 10**6


def three(**more: Any) -> dict[str, Any]:
    """The three swapped networks of research/realtime.md, T5."""

    def task(name: str, period: int, act: int, blocks: list[tuple[int, int, int]]) -> dict[str, Any]:
        return {
            "name": name,
            "period": f"{period}ms",
            "activation_bytes": act * MB,
            "blocks": [{"load": f"{a}ms", "compute": f"{b}ms", "bytes": c * MB} for a, b, c in blocks],
        }

    return {
        "budget": 200 * MB,
        "tasks": [
            task("t1", 60, 4, [(2, 3, 20), (2, 4, 20), (2, 3, 20)]),
            task("t2", 100, 6, [(5, 4, 50)] * 3 + [(5, 3, 50)]),
            task("t3", 200, 8, [(8, 7, 80), (8, 6, 80), (7, 6, 70), (7, 6, 70)]),
        ],
        **more,
    }


# Premises that do not depend on how busy the machine is.
ANYWHERE = (
    "decisions at boundaries only",
    "the right job at every boundary",
    "arrivals within the contracts",
    "memory within the budget",
)


def assert_premises(record: Record, *names: str) -> None:
    premises = {premise.name: premise for premise in conform(record).premises}
    for name in names:
        assert premises[name].holds, premises[name]
