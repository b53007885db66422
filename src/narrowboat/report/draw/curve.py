"""What each budget costs, as steps, with points and lines to look for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from narrowboat.report.draw.theme import (
    ALERT,
    COMPUTE,
    FAINT,
    INK,
    MIB,
    READ,
    WIDE,
    line,
    new_figure,
    put_legend,
    put_title,
    styled,
)


@dataclass(frozen=True, slots=True)
class Curve:
    """Cost (or gain) against budget; budgets in bytes, ascending.

    Attributes:
        points: predicted (budget, value), by steps: a value holds until the next budget.
        ylabel: below the numbers of the vertical axis.
        measured: (budget, value).
        bound: (budget, value) that no plan beats.
        marks: (budget, value, matplotlib marker, label) of points to look for.
        budget, value: what was asked for, drawn across, with a label.
        steps: whether there are steps between the points, not straight lines.
    """

    points: Sequence[tuple[int, float]]
    ylabel: str
    measured: Sequence[tuple[int, float]] = ()
    bound: Sequence[tuple[int, float]] = ()
    marks: Sequence[tuple[int, float, str, str]] = ()
    budget: tuple[int, str] | None = None
    value: tuple[float, str] | None = None
    steps: bool = True
    lines: Sequence[tuple[float, str]] = field(default=())


@styled
def draw_cost(curve: Curve, *, title: str = "", width: float = WIDE) -> Any:
    """Draw a ``Curve``.

    Args:
        curve: what to draw.
        title: above the picture.
        width: inches.

    Returns:
        matplotlib's Figure.
    """
    figure = new_figure(width, 3.9)
    axes = figure.add_subplot()
    handles = []
    if curve.points:
        axes.plot(*_mib(curve.points), color=READ, drawstyle="steps-post" if curve.steps else "default")
        handles.append(line(READ, "predicted"))
    if curve.bound:
        axes.plot(*_mib(curve.bound), color=FAINT, linewidth=1, linestyle="--")
        handles.append(line(FAINT, "no plan can be faster", linestyle="--", linewidth=1))
    for budget, value, marker, label in curve.marks:
        axes.plot(budget / MIB, value, marker, color=INK, markersize=6)
        handles.append(line(INK, label, marker=marker, linestyle=""))
    if curve.measured:
        axes.plot(*_mib(curve.measured), "x", color=ALERT, markersize=7, markeredgewidth=2)
        handles.append(line(ALERT, "measured", marker="x", linestyle="", markersize=7, markeredgewidth=2))
    for value, label in curve.lines:
        axes.axhline(value, color=COMPUTE, linewidth=1.2, linestyle="-.")
        handles.append(line(COMPUTE, label, linestyle="-.", linewidth=1.2))
    if curve.budget is not None:
        axes.axvline(curve.budget[0] / MIB, color=ALERT, linewidth=1, linestyle=":")
        handles.append(line(ALERT, curve.budget[1], linestyle=":", linewidth=1))
    if curve.value is not None:
        axes.axhline(curve.value[0], color=ALERT, linewidth=1, linestyle=":")
        handles.append(line(ALERT, curve.value[1], linestyle=":", linewidth=1))
    axes.set_ylim(0, (axes.get_ylim()[1] or 1) * 1.06)
    axes.set_xlabel("budget, MiB")
    axes.set_ylabel(curve.ylabel)
    put_title(axes, title, width)
    put_legend(figure, handles, width)
    return figure


def _mib(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [budget / MIB for budget, _ in points], [value for _, value in points]
