"""Memory over time against the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrowboat.quantities import format_bytes
from narrowboat.report.draw.theme import (
    ALERT,
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

_POINTS = 4_000  # more are thinned, the highest of each stretch kept


@styled
def draw_memory(
    points: Sequence[tuple[float, int]],
    budgets: Sequence[tuple[float, int]],
    *,
    peak: int | None = None,
    steps: bool = False,
    title: str = "",
    width: float = WIDE,
    figure: Any = None,
) -> Any:
    """Bytes held over seconds; the budget dashed, as it changed, and the highest mark dotted.

    Args:
        points: (seconds, bytes), at least one, in order.
        budgets: (seconds from which on, bytes); may be empty.
        peak: bytes; what was highest, if somebody saw more than the points.
        steps: what is held between two points is what it was at the first.
        title: above the picture.
        width: inches.
        figure: to draw in, a part of a larger one say.

    Returns:
        matplotlib's Figure.
    """
    figure = new_figure(width, 2.9) if figure is None else figure
    axes = figure.add_subplot()
    thin = _thinned(points)
    times, held = [when for when, _ in thin], [nbytes / MIB for _, nbytes in thin]
    end = max(times[-1], budgets[-1][0] if budgets else 0.0)
    if steps:
        axes.step([*times, end], [*held, held[-1]], where="post", color=READ, linewidth=1.2)
        axes.fill_between([*times, end], [*held, held[-1]], step="post", color=READ, alpha=0.15, linewidth=0)
    else:
        axes.plot(times, held, color=READ)
        axes.fill_between(times, held, color=READ, alpha=0.15, linewidth=0)
    handles = [line(READ, "held" if steps else "resident, over the baseline")]
    top = max(max(held), (peak or 0) / MIB)
    if budgets:
        lines = [nbytes / MIB for _, nbytes in budgets]
        axes.step(
            [when for when, _ in budgets] + [end], [*lines, lines[-1]], where="post", color=ALERT, linestyle="--"
        )
        told = [f"budget {format_bytes(budgets[0][1])}"]
        if len(budgets) > 1:
            told = [f"budget {format_bytes(min(b for _, b in budgets))} to {format_bytes(max(b for _, b in budgets))}"]
        handles.append(line(ALERT, told[0], linestyle="--"))
        top = max(top, *lines)
    if peak:
        axes.axhline(peak / MIB, color=INK, linestyle=":", linewidth=1)
        handles.append(line(INK, f"highest {format_bytes(peak)}", linestyle=":"))
    axes.set_ylim(0, top * 1.12 or 1)
    axes.set_xlim(times[0], end if end > times[0] else times[0] + 1)
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB")
    put_title(axes, title, width)
    put_legend(figure, handles, width)
    return figure


def _thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    if len(points) <= _POINTS:
        return list(points)
    size = -(-len(points) // (_POINTS // 2))
    kept = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        ends = {0, max(range(len(stretch)), key=lambda k: stretch[k][1])}
        kept += [stretch[k] for k in sorted(ends)]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
