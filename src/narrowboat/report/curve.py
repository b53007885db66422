"""Latency against budget, for one model on one machine: the table, and its picture."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import BudgetError, UsageError
from narrowboat.plan.curve import budgets, smallest_for
from narrowboat.plan.model import Machine
from narrowboat.plan.result import Plan
from narrowboat.plan.table import PlanTable, TableRow
from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report.picture import save_png
from narrowboat.report.plots import latency_curve
from narrowboat.report.run import run_model
from narrowboat.stream.prepare import Prepared

_POINTS = 32
_MEASURED = 6


def pareto(
    prepared: Prepared, machine: Machine, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> PlanTable:
    """The Pareto front from the smallest budget to one that holds everything.

    Args:
        prepared: the model; its policy is left as it was.
        machine: its storage.
        progress: called with (budgets done, budgets in all).
    """
    least = _least(prepared)
    tried = budgets(least, max(prepared.enough(), least), _POINTS)
    before, found = prepared.policy, []
    for done, budget in enumerate(tried, start=1):
        plan = prepared.choose(machine, budget, thorough=True)[0]
        found.append(TableRow(prepared.policy.value, plan))
        progress(done, len(tried))
    prepared.policy = before
    return PlanTable(found)


def smallest_budget(prepared: Prepared, machine: Machine, target: float) -> Plan:
    """The plan with the smallest budget that predicts at most ``target`` seconds per pass.

    Raises:
        UsageError: no budget does; says how short a pass can be.
    """
    points = pareto(prepared, machine).plans
    found = smallest_for(target, points, lambda budget: prepared.choose(machine, budget, thorough=True)[0])
    if found is None:
        best = points[-1]
        raise UsageError(
            f"no budget gives {format_seconds(target)} per pass here: {format_bytes(best.budget)} gives "
            f"{format_seconds(best.predicted_latency)}, of which {format_seconds(best.timing.compute)} is computing"
        )
    return found


def measure_points(
    factory: Callable[[], nn.Module],
    weights: str | Path | WeightsIndex,
    inputs: tuple[Any, ...],
    points: Sequence[Plan],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[int, float]]:
    """``(budget in bytes, median seconds of the steady passes)`` at up to six budgets of a front, largest first run.

    Args:
        factory: makes the module.
        weights: a weights file or folder, or the index of one.
        inputs: positional arguments of a pass.
        points: the front.
        progress: called with (budgets done, budgets in all).
    """
    count = min(len(points), _MEASURED)
    chosen = sorted({round(i * (len(points) - 1) / max(count - 1, 1)) for i in range(count)}, reverse=True)
    found = []
    for done, number in enumerate(chosen, start=1):
        report = run_model(factory, weights, budget=points[number].budget, inputs=inputs, passes=8)
        found.append((points[number].budget, statistics.median(report.latency_ms[3:]) / 1e3))
        progress(done, len(chosen))
    return found


def curve_as_dict(points: Sequence[Plan], measured: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """A front for JSON, and what was measured at some of its budgets; bytes and milliseconds."""
    return {
        "curve": [
            {
                "budget_bytes": plan.budget,
                "predicted_latency_ms": plan.predicted_latency * 1e3,
                "bound_ms": plan.lower_bound * 1e3,
                "bytes_read_per_pass": plan.timing.bytes_read,
                "all_resident": not plan.streamed,
            }
            for plan in points
        ],
        "measured": [{"budget_bytes": budget, "latency_ms": seconds * 1e3} for budget, seconds in sorted(measured)],
    }


def _least(prepared: Prepared) -> int:
    try:
        return prepared.check(0)[0]
    except BudgetError as error:
        return error.minimum


def draw_curve(
    points: Sequence[Plan],
    path: str | Path,
    *,
    title: str = "",
    measured: Sequence[tuple[int, float]] = (),
    target: float | None = None,
) -> None:
    """Draw predicted latency against budget, with the minimum, the knee and the fully resident point.

    Args:
        points: a front.
        path: a PNG file.
        title: above the picture.
        measured: ``(budget in bytes, seconds)`` to put on top.
        target: seconds; drawn as a line.

    Raises:
        UsageError: matplotlib is not installed.
        StorageError: the file cannot be written.
    """
    save_png(latency_curve(points, measured=measured, target=target, title=title), Path(path))
