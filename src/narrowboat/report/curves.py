"""Cost against budget as something to draw, from whatever knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from narrowboat.errors import UsageError
from narrowboat.plan.curve import knee
from narrowboat.plan.result import Plan
from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report.draw.curve import Curve
from narrowboat.report.records.model import BenchRecord, PlanRecord, ProfileRecord
from narrowboat.report.records.training import TimeRow, TrainPlanRecord
from narrowboat.report.sources import is_a


@dataclass(frozen=True, slots=True)
class Point:
    """One budget, named as a Plan names these: bytes, and seconds."""

    budget: int
    predicted_latency: float
    lower_bound: float = 0.0
    all_resident: bool = False


def latency_curve_of(source: Any, measured: Sequence[tuple[int, float]] = (), target: float | None = None) -> Curve:
    """Latency in ms against budget, marked: the smallest budget, the knee, and the one with everything in memory.

    Args:
        source: plans, or a record of ``plan --curve``, ``profile`` or ``bench``.
        measured: (bytes, seconds).
        target: seconds.

    Raises:
        UsageError: it has no curve.
    """
    lines: list[tuple[float, str]] = []
    if isinstance(source, BenchRecord):
        points, seen, lines = _of_bench(source)
        measured = [*measured, *seen]
    elif isinstance(source, PlanRecord):
        points = [
            Point(row.budget_bytes, row.predicted_latency_ms / 1e3, row.bound_ms / 1e3, row.all_resident)
            for row in source.curve
        ]
        measured = [*measured, *((row.budget_bytes, row.latency_ms / 1e3) for row in source.measured)]
    elif isinstance(source, ProfileRecord):
        points = [
            Point(row.budget, row.latency_ms / 1e3, row.lower_bound_ms / 1e3, not row.streamed) for row in source.table
        ]
    elif isinstance(source, Sequence) and source and all(is_a(each, "plan.result:Plan") for each in source):
        points = [Point(p.budget, p.predicted_latency, p.lower_bound, not p.streamed) for p in source]
    else:
        raise UsageError(
            "latency_curve() takes plans, a profile, or a record of plan --curve, profile or bench; "
            f"this is a {type(source).__name__}"
        )
    if not points and not measured:
        raise UsageError("there is nothing to draw: this record has no curve (plan --curve FILE.png makes one)")
    return Curve(
        points=[(p.budget, p.predicted_latency * 1e3) for p in points],
        ylabel="milliseconds per pass",
        measured=[(nbytes, seconds * 1e3) for nbytes, seconds in measured],
        bound=[(p.budget, p.lower_bound * 1e3) for p in points if p.lower_bound],
        marks=_marks(points),
        value=None if target is None else (target * 1e3, f"target {format_seconds(target)}"),
        steps=not isinstance(source, BenchRecord),
        lines=lines,
    )


def _marks(points: Sequence[Point]) -> list[tuple[int, float, str, str]]:
    if not points:
        return []
    last = "all in memory" if points[-1].all_resident else "largest"
    chosen = [(points[0], "smallest", "o"), (points[-1], last, "s")]
    bend = cast("Point | None", knee(cast("Sequence[Plan]", points)))
    if bend is not None:
        chosen.insert(1, (bend, "knee", "D"))
    return [
        (p.budget, p.predicted_latency * 1e3, mark, f"{name}: {format_bytes(p.budget)}, {_ms(p)}")
        for p, name, mark in chosen
    ]


def _ms(point: Point) -> str:
    return format_seconds(point.predicted_latency)


def _of_bench(record: BenchRecord) -> tuple[list[Point], list[tuple[int, float]], list[tuple[float, str]]]:
    """Predicted and measured, and plain PyTorch's latency as a line."""
    rows = sorted((row for row in record.rows if row.budget_bytes is not None), key=lambda row: row.budget_bytes or 0)
    points = [Point(r.budget_bytes or 0, r.predicted_latency_ms / 1e3) for r in rows if r.predicted_latency_ms]
    seen = [(r.budget_bytes or 0, r.latency_ms / 1e3) for r in rows if r.latency_ms is not None]
    plain = [row.latency_ms for row in record.rows if row.budget_bytes is None and row.latency_ms]
    lines = [(ms, f"plain PyTorch, all in memory: {format_seconds(ms / 1e3)}") for ms in plain[:1]]
    return points, seen, lines


def time_curve_of(source: Any, budget: int | None, *, throughput: bool) -> Curve:
    """A training step's time over the plain one's, or samples per second, against budget.

    Args:
        source: TimePoints, a TrainForecast, or a record of ``plan --train``.
        budget: bytes that were asked for; None for those of the record.
        throughput: samples per second instead of time.

    Raises:
        UsageError: it has no curve.
    """
    seconds, batch = 0.0, 0
    if isinstance(source, TrainPlanRecord):
        points: Sequence[Any] = source.curve
        seconds, batch = source.plain_seconds, source.batch
        budget = source.budget_bytes if budget is None else budget
    elif is_a(source, "report.train_curve:TrainForecast"):
        points, seconds, budget = source.curve, source.plan.plain_seconds, budget or source.plan.budget
        batch = source.batch
    elif isinstance(source, Sequence) and all(
        is_a(each, "report.train_curve:TimePoint") or isinstance(each, TimeRow) for each in source
    ):
        points = source
    else:
        raise UsageError(
            f"this takes the points of a training curve or a record of plan --train, and is a {type(source).__name__}"
        )
    if not points:
        raise UsageError("there is nothing to draw: the curve has no points")
    rate = batch / seconds if throughput and seconds and batch else 1.0
    values = [(p.budget, rate / p.slowdown if throughput else p.slowdown) for p in points if p.slowdown > 0]
    unit = "samples/s" if rate != 1.0 else "of the plain step's speed"
    ylabel = f"{'samples per second' if rate != 1.0 else 'share of the plain step’s speed'}, predicted"
    marks = [
        (nbytes, value, mark, f"{name}: {format_bytes(nbytes)}, {value:.3g} {unit if throughput else 'times'}")
        for (nbytes, value), name, mark in ((values[0], "smallest", "o"), (values[-1], "fastest", "s"))
    ]
    inside = budget is not None and points[0].budget <= budget <= points[-1].budget
    return Curve(
        points=values,
        ylabel=ylabel if throughput else "time of a step, times the plain one's",
        marks=marks,
        budget=(budget, f"budget {format_bytes(budget)}") if budget is not None and inside else None,
    )
