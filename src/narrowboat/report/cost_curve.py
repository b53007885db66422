"""The picture that every forecast shares: what each budget costs, as steps, with points and lines to look for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narrowboat.report.picture import require_matplotlib, save_png

MIB = 1 << 20
ALERT = "#d1495b"


class CostCurve:
    """Cost against budget; ``axes`` is matplotlib's, for what else is to be drawn.

    Args:
        budgets: bytes, ascending.
        costs: of each, in the unit of ``ylabel``.
        ylabel: below the numbers of the vertical axis.
        title: above the picture.

    Raises:
        UsageError: matplotlib is not installed.
    """

    def __init__(self, budgets: Sequence[int], costs: Sequence[float], *, ylabel: str, title: str) -> None:
        self._figure = require_matplotlib()(figsize=(8, 4.6), dpi=110, layout="constrained")
        self.axes: Any = self._figure.add_subplot()
        mib = [budget / MIB for budget in budgets]
        self.axes.step(mib, costs, where="post", color="#3b7dd8", label="predicted")
        self.axes.set_xlabel("budget, MiB")
        self.axes.set_ylabel(ylabel)
        self.axes.set_title(title)

    def mark(self, budget: int, cost: float, marker: str, label: str) -> None:
        """A point of the curve with a name."""
        self.axes.plot(budget / MIB, cost, marker, color="#1f3b66", label=label)

    def line(self, label: str, *, budget: int | None = None, cost: float | None = None) -> None:
        """What was asked for, across the picture: bytes, or a cost."""
        style = {"color": ALERT, "linewidth": 0.8, "linestyle": ":", "label": label}
        if budget is not None:
            self.axes.axvline(budget / MIB, **style)
        if cost is not None:
            self.axes.axhline(cost, **style)

    def save(self, path: str | Path) -> None:
        """Write a PNG file.

        Raises:
            StorageError: it cannot be written.
        """
        self.axes.set_ylim(bottom=0)
        self.axes.legend(fontsize=8)
        self.axes.grid(alpha=0.25)
        save_png(self._figure, Path(path))
