"""Several series over one axis: what benchmarks are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from narrowboat.report.draw.theme import CYCLE, FAINT, WIDE, line, new_figure, put_legend, put_title, safe, styled

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@styled
def draw_lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    joined: bool = True,
    diagonal: bool = False,
    title: str = "",
    width: float = WIDE,
) -> Any:
    """Points of each series in a colour and a shape of their own.

    Args:
        series: (x, y) by name.
        xlabel, ylabel: with units.
        joined: with lines between them.
        diagonal: also draw where x equals y.
        title: above the picture.
        width: inches.

    Returns:
        matplotlib's Figure.
    """
    figure = new_figure(width, 3.9)
    axes = figure.add_subplot()
    handles = []
    for number, (name, points) in enumerate(series.items()):
        colour, marker = CYCLE[number % len(CYCLE)], _MARKERS[number % len(_MARKERS)]
        style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "-" if joined else ""}
        axes.plot(*zip(*sorted(points), strict=True), **style)
        handles.append(line(label=safe(name), colour=colour, marker=marker, linestyle=style["linestyle"]))
    if diagonal:
        top = max(max(point) for points in series.values() for point in points)
        axes.plot([0, top], [0, top], color=FAINT, linestyle="--", linewidth=1)
        handles.append(line(FAINT, "as predicted", linestyle="--", linewidth=1))
        axes.set_xlim(left=0)
    axes.set_ylim(0, (axes.get_ylim()[1] or 1) * 1.04)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    put_title(axes, title, width)
    put_legend(figure, handles, width)
    return figure
