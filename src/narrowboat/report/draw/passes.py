"""Passes, tokens or steps one by one: what each took beside what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrowboat.quantities import format_seconds
from narrowboat.report.draw.theme import (
    COMPUTE,
    INK,
    STALL,
    WIDE,
    line,
    new_figure,
    patch,
    put_legend,
    put_title,
    styled,
)

_BARS = 160  # more are drawn as an area


@styled
def draw_passes(
    latency_ms: Sequence[float],
    stall_ms: Sequence[float],
    predicted_ms: Sequence[float],
    *,
    unit: str = "pass",
    title: str = "",
    width: float = WIDE,
) -> Any:
    """Computing and waiting of each pass, stacked, and the prediction as a line.

    Args:
        latency_ms, stall_ms: of each, milliseconds.
        predicted_ms: of each, or one for all; may be empty.
        unit: what one is called.
        title: above the picture.
        width: inches.

    Returns:
        matplotlib's Figure.
    """
    figure = new_figure(width, 3.1)
    axes = figure.add_subplot()
    numbers = list(range(1, len(latency_ms) + 1))
    waits = [min(stall, whole) for stall, whole in zip(stall_ms, latency_ms, strict=True)]
    computing = [whole - wait for whole, wait in zip(latency_ms, waits, strict=True)]
    if len(numbers) <= _BARS:
        axes.bar(numbers, computing, 0.78, color=COMPUTE)
        axes.bar(numbers, waits, 0.78, bottom=computing, color=STALL)
    else:
        axes.stackplot(numbers, computing, waits, colors=[COMPUTE, STALL], step="mid", linewidth=0)
    handles = [patch(COMPUTE, "computing, reads beside it"), patch(STALL, "waiting for weights")]
    if predicted_ms:
        told = list(predicted_ms) if len(predicted_ms) == len(numbers) else [predicted_ms[-1]] * len(numbers)
        edges = [number - 0.5 for number in numbers] + [numbers[-1] + 0.5]
        axes.stairs(told, edges, color=INK, linewidth=1.6, baseline=None)
        handles.append(line(INK, f"predicted: {format_seconds(told[-1] / 1e3)}", linewidth=1.6))
    axes.set_xlim(0.4, len(numbers) + 0.6)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel(unit)
    axes.set_ylabel(f"milliseconds per {unit}")
    put_title(axes, title, width)
    put_legend(figure, handles, width)
    return figure
