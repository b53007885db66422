"""Throughput against memory: which settings fit, which is the fastest, and who is ahead at the same peak. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

ROUNDING = 1e-9  # largest distance of float64 gradients, relative to their length, that a sum's order explains
TOLERANCE = 0.05  # of a rate: what medians of a few steps on a shared machine are good to


@dataclass(frozen=True, slots=True)
class Point:
    """One setting as measured.

    Attributes:
        subject: who.
        label: at which knobs.
        peak: most bytes at one time.
        rate: samples per second.
        exact: its gradients are the plain step's, up to the order of sums.
    """

    subject: str
    label: str
    peak: int
    rate: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """A static setting, and the fastest of ours that peaks no higher.

    Attributes:
        static: the setting to beat.
        ours: None where nothing of ours peaks as low.
    """

    static: Point
    ours: Point | None

    @property
    def ratio(self) -> float | None:
        """Our rate over the static one; None where there is none to compare."""
        return None if self.ours is None else self.ours.rate / self.static.rate

    @property
    def passed(self) -> bool:
        """Not slower at the same peak or a lower one."""
        return self.ratio is not None and self.ratio >= 1 - TOLERANCE


def sameness(record: dict[str, Any], plain: dict[str, Any]) -> str:
    """How a record's gradients compare with the plain step's.

    Returns:
        ``"bits"``; ``"rounding"`` (within :data:`ROUNDING`: for float64); ``"other"``; or ``"unknown"`` where the
        gradients could not be looked at.
    """
    if record.get("gradients") is not None and record["gradients"] == plain.get("gradients"):
        return "bits"
    difference = record.get("difference")
    if difference is None:
        # Whoever steps inside the backward pass shows no gradients, but the parameters after the step tell as much.
        same = record.get("parameters") is not None and record["parameters"] == plain.get("parameters")
        return "bits" if same else "unknown"
    return "rounding" if difference <= ROUNDING else "other"


def points(records: Iterable[dict[str, Any]], peak: str = "allocator_peak") -> list[Point]:
    """The records that were measured to the end.

    Args:
        records: of one model.
        peak: which meter: ``"allocator_peak"``, or ``"rss_peak"``, what the kernel counts and a machine runs out of.
    """
    return [
        Point(
            record["subject"],
            record["label"],
            record[peak],
            record["rate"],
            record["sameness"] in ("bits", "rounding"),
        )
        for record in records
        if record.get("rate") and record.get(peak)
    ]


def fastest_within(candidates: Iterable[Point], peak: int) -> Point | None:
    """The fastest that peaks at ``peak`` or below; of equally fast ones the smallest."""
    fitting = [point for point in candidates if point.peak <= peak]
    return max(fitting, key=lambda point: (point.rate, -point.peak), default=None)


def pareto(candidates: Iterable[Point]) -> list[Point]:
    """Those that no other one beats in both peak and rate, by rising peak."""
    best: list[Point] = []
    for point in sorted(candidates, key=lambda point: (point.peak, -point.rate)):
        if not best or point.rate > best[-1].rate:
            best.append(point)
    return best


def against_static(ours: Sequence[Point], static: Iterable[Point]) -> list[Comparison]:
    """Every exact static setting with the best of ours at its peak; ours must be exact as well."""
    exact = [point for point in ours if point.exact]
    return [Comparison(point, fastest_within(exact, point.peak)) for point in static if point.exact]
