"""One look for every picture: colours that the colour-blind tell apart, sizes, names that cannot do harm.

Palette: M. Okabe and K. Ito, "Color Universal Design" (2008), with darker neighbours where white needs contrast.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, ParamSpec

from narrowboat.report.picture import picture_bytes, require_matplotlib

INK, FAINT, GRID, FACE = "#1b2430", "#5b6673", "#d3d9e0", "#ffffff"
READ, COMPUTE, STALL, ALERT, CHANGE, REST = "#0072b2", "#009e73", "#e69f00", "#d55e00", "#8f5aa8", "#8793a1"
ON_COLOUR, ON_STALL = "#fffffe", "#10151b"
"""Text on a coloured bar; on orange it is always dark."""
CYCLE = (READ, STALL, COMPUTE, "#cc79a7", "#56b4e9", "#8c6d1f", CHANGE, REST)
"""Of tasks, subjects, parts: in this order."""

DARK = {
    INK: "#e7ecf2", FAINT: "#a7b2bf", GRID: "#333d4a", FACE: "#1a2028", READ: "#58aee6", COMPUTE: "#2fc79a",
    STALL: "#f2b33d", ALERT: "#ff8a52", CHANGE: "#c79be0", REST: "#93a1b1", "#cc79a7": "#e7a3c8",
    "#56b4e9": "#9fd6f7", "#8c6d1f": "#cdb061", ON_COLOUR: "#10151b",
}  # fmt: skip
"""What a colour becomes on a dark page."""

MIB = 1 << 20
WIDE, NARROW = 8.0, 4.2
"""Inches: for a page or a notebook, and for a phone."""

_RC: dict[str, Any] = {
    "figure.facecolor": FACE,
    "savefig.facecolor": FACE,
    "figure.dpi": 110,
    "savefig.dpi": 150,
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.facecolor": FACE,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
}
_Given = ParamSpec("_Given")


@contextmanager
def themed(**more: Any) -> Iterator[None]:
    """matplotlib's settings for drawing and saving; those of the program come back after."""
    require_matplotlib()
    from matplotlib import rc_context

    settings: Any = {**_RC, **more}
    with rc_context(settings):
        yield


def styled(draw: Callable[_Given, Any]) -> Callable[_Given, Any]:
    """For functions that make a figure: with these settings."""

    @wraps(draw)
    def within(*args: _Given.args, **kwargs: _Given.kwargs) -> Any:
        with themed():
            return draw(*args, **kwargs)

    return within


def new_figure(width: float, height: float) -> Any:
    """A figure without a display, in inches, whose parts make room for one another; a notebook shows it by itself."""
    return _figure_class()(figsize=(width, height), layout="constrained")


@cache
def _figure_class() -> Any:
    base: Any = require_matplotlib()

    class NotebookFigure(base):
        """matplotlib's Figure, which IPython only shows where pyplot is in use."""

        def _repr_png_(self) -> bytes:
            return picture_bytes(self, "png")

    return NotebookFigure


def safe(name: object, most: int = 28) -> str:
    """A name of somebody else's as text: no mathematics, one line, not too long, and never skipped by a legend."""
    text = "".join(c if c.isprintable() else " " for c in str(name))
    text = text if len(text) <= most else "…" + text[-(most - 1) :].lstrip(".")
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")


def put_title(axes: Any, text: str, width: float) -> None:
    """A title above a picture of so many inches, in as many lines as it takes."""
    if text:
        axes.set_title("\n".join(textwrap.wrap(safe(text, 160), max(int(width * 11), 20))))


def put_legend(figure: Any, handles: list[Any], width: float) -> None:
    """Below everything, in as many columns as there is room for."""
    if not handles:
        return
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = int(min(max(width * 12.5 // (longest + 6), 1), len(handles)))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, handlelength=1.6, columnspacing=1.2)


def patch(colour: str, label: str, **more: Any) -> Any:
    """A coloured field of a legend."""
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=label, **more)


def line(colour: str, label: str, **more: Any) -> Any:
    """A line of a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, label=label, **more)
