"""Blocks of a model beside one another: what was predicted of each, what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from narrowboat.report.draw.theme import (
    ALERT,
    COMPUTE,
    INK,
    MIB,
    READ,
    REST,
    STALL,
    WIDE,
    line,
    new_figure,
    patch,
    put_legend,
    put_title,
    safe,
    styled,
)

_SHOWN = 40


@dataclass(frozen=True, slots=True)
class Bar:
    """One block. Times in milliseconds; None where they are not known.

    Attributes:
        name: of it.
        parts: what is stacked, in the order of the labels.
        predicted: of the whole, drawn as a mark.
        nbytes: of its weights.
        resident: whether it stays in.
    """

    name: str
    parts: tuple[float, ...]
    predicted: float | None = None
    nbytes: int = 0
    resident: bool = False


@styled
def draw_blocks(
    bars: Sequence[Bar],
    labels: Sequence[str],
    *,
    title: str = "",
    width: float = WIDE,
    shown: int = _SHOWN,
    predicted_label: str = "predicted",
) -> Any:
    """Blocks in the order of the pass: stacked times and a mark. Of many, those of one module are taken together.

    Where even that leaves too many rows, those that take longest are shown, and the others in one row.

    Args:
        bars: in order of first use.
        labels: of the parts, at most three.
        title: above the picture.
        width: inches.
        shown: rows at most, but for the one of the others.
        predicted_label: what the mark is.

    Returns:
        matplotlib's Figure.
    """
    bars = _grouped(bars, shown)
    slowest = sorted(range(len(bars)), key=lambda k: -max(sum(bars[k].parts), bars[k].predicted or 0.0))
    chosen = sorted(slowest[:shown])
    rest = [bars[k] for k in slowest[shown:]]
    rows = [bars[k] for k in chosen]
    if rest:
        parts = tuple(sum(bar.parts[k] for bar in rest) for k in range(len(labels)))
        told = None if any(bar.predicted is None for bar in rest) else sum(bar.predicted or 0.0 for bar in rest)
        rows.append(Bar(f"{len(rest)} others, together", parts, told))
    figure = new_figure(width, 1.3 + 0.2 * len(rows))
    axes = figure.add_subplot()
    colours = (COMPUTE, STALL, READ)[: len(labels)]
    places = range(len(rows))
    left = [0.0] * len(rows)
    for number, colour in enumerate(colours):
        values = [bar.parts[number] for bar in rows]
        axes.barh(places, values, 0.72, left=left, color=colour)
        left = [at + value for at, value in zip(left, values, strict=True)]
    handles = [patch(colour, label) for colour, label in zip(colours, labels, strict=True)]
    marked = [(bar.predicted, row) for row, bar in enumerate(rows) if bar.predicted is not None]
    if marked:
        axes.plot(*zip(*marked, strict=True), "|", color=INK, markersize=10, markeredgewidth=2)
        handles.append(line(INK, predicted_label, marker="|", linestyle="", markersize=9, markeredgewidth=2))
    most = 30 if width >= WIDE else 20
    axes.set_yticks(list(places), [safe(bar.name, most) + (" ●" if bar.resident else "") for bar in rows])
    if any(bar.resident for bar in rows):
        handles.append(line(INK, "stays in memory", marker="o", linestyle="", markersize=4))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("milliseconds per pass")
    put_title(axes, title, width)
    put_legend(figure, handles, width)
    return figure


def _grouped(bars: Sequence[Bar], most: int) -> Sequence[Bar]:
    """Blocks whose names begin alike as one, as few of them together as make at most ``most``."""
    depth = max((bar.name.count(".") + 1 for bar in bars), default=1)
    while len(bars) > most and depth > 1:
        depth -= 1
        together: dict[str, list[Bar]] = {}
        for bar in bars:
            together.setdefault(".".join(bar.name.split(".")[:depth]), []).append(bar)
        bars = [_sum(mine, name) for name, mine in together.items()]
    return bars


def _sum(mine: list[Bar], name: str) -> Bar:
    if len(mine) == 1:
        return mine[0]
    known = [bar.predicted for bar in mine if bar.predicted is not None]
    return Bar(
        name,
        tuple(map(sum, zip(*(bar.parts for bar in mine), strict=True))),
        sum(known) if len(known) == len(mine) else None,
        sum(bar.nbytes for bar in mine),
        all(bar.resident for bar in mine),
    )


@styled
def draw_parts(
    parts: Sequence[tuple[str, int]], budget: int, *, peak: int | None = None, title: str = "", width: float = WIDE
) -> Any:
    """Where a budget goes: its parts end to end, with the budget and the measured peak as lines.

    Args:
        parts: names and bytes.
        budget: bytes.
        peak: bytes that were measured at most; None where nothing ran.
        title: above the picture.
        width: inches.

    Returns:
        matplotlib's Figure.
    """
    shown = [(name, nbytes) for name, nbytes in parts if nbytes > 0]
    figure = new_figure(width, 1.15 + 0.26 * len(shown))
    axes = figure.add_subplot()
    at, colours = 0.0, (READ, "#56b4e9", COMPUTE, STALL, "#cc79a7", REST)
    for row, (_, nbytes) in enumerate(shown):
        size = nbytes / MIB
        axes.barh(row, size, 0.7, left=at, color=colours[row % len(colours)])
        axes.text(at + size, row, f"  {size:,.1f}", va="center", ha="left", fontsize=8)
        at += size
    most = 30 if width >= WIDE else 16
    axes.set_yticks(range(len(shown)), [safe(name, most) for name, _ in shown])
    axes.axvline(budget / MIB, color=ALERT, linestyle="--", linewidth=1.4)
    handles = [line(ALERT, f"budget {budget / MIB:,.1f} MiB", linestyle="--")]
    if peak:
        axes.axvline(peak / MIB, color=INK, linestyle=":", linewidth=1.4)
        handles.append(line(INK, f"measured peak {peak / MIB:,.1f} MiB", linestyle=":"))
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, max(budget / MIB, at, (peak or 0) / MIB) * 1.12)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("MiB")
    put_title(axes, title, width)
    put_legend(figure, handles, width)
    return figure
