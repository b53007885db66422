"""Training steps: time and memory of each, beside what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.report.draw.theme import (
    ALERT,
    COMPUTE,
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


@styled
def draw_train_steps(
    seconds: Sequence[float],
    measured: Sequence[int],
    predicted: Sequence[int],
    budgets: Sequence[int],
    *,
    predicted_seconds: float = 0.0,
    first: int = 1,
    title: str = "",
    width: float = WIDE,
) -> Any:
    """Two pictures above one another: seconds per step, and the peak of each step against prediction and budget.

    Args:
        seconds: of each step, optimizer included.
        measured, predicted: peaks of each step, bytes; a measured 0 was not measured.
        budgets: in force at each step, bytes.
        predicted_seconds: of forward and backward together; 0 if it is not known.
        first: number of the first step.
        title: above the picture.
        width: inches.

    Returns:
        matplotlib's Figure.
    """
    figure = new_figure(width, 4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    numbers = list(range(first, first + len(seconds)))
    mark = "o" if len(numbers) <= 60 else ""
    above.plot(numbers, seconds, color=COMPUTE, marker=mark, markersize=3)
    handles = [line(COMPUTE, "time, measured")]
    if predicted_seconds:
        above.axhline(predicted_seconds, color=INK, linestyle="-.", linewidth=1.2)
        label = f"predicted, without optimizer: {format_seconds(predicted_seconds)}"
        handles.append(line(INK, label, linestyle="-."))
    above.set_ylim(0, max(*seconds, predicted_seconds) * 1.12 or 1)
    above.set_ylabel("seconds per step")
    if any(measured):
        seen = [(number, nbytes / MIB) for number, nbytes in zip(numbers, measured, strict=True) if nbytes]
        below.plot(*zip(*seen, strict=True), color=READ, marker=mark, markersize=3)
        handles.append(line(READ, "peak, measured"))
    edges = [number - 0.5 for number in numbers] + [numbers[-1] + 0.5]
    below.stairs([nbytes / MIB for nbytes in predicted], edges, color=INK, linewidth=1.4, baseline=None)
    handles.append(line(INK, f"peak, predicted: {format_bytes(max(predicted))}", linewidth=1.4))
    below.stairs([b / MIB for b in budgets], edges, color=ALERT, linestyle="--", linewidth=1.4, baseline=None)
    handles.append(line(ALERT, f"budget {format_bytes(budgets[-1])}", linestyle="--"))
    below.set_ylim(0, max(*measured, *predicted, *budgets) / MIB * 1.12)
    below.set_ylabel("MiB")
    below.set_xlabel("step")
    below.xaxis.get_major_locator().set_params(integer=True)
    put_title(above, title, width)
    put_legend(figure, handles, width)
    return figure
