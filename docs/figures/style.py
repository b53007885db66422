"""How the figures of the concept pages look: one drawing for light pages and one for dark ones, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

SIZE = (7.6, 3.4)  # inches


@dataclass(frozen=True)
class Look:
    """Colours of one kind of page.

    Attributes:
        name: ``"light"`` or ``"dark"``; the file's name ends with it.
        text: of letters and axes.
        ink: of letters on full colours.
    faint: of grids and of what is in the background.
        tasks: of different tasks or blocks, told apart by lightness too.
        resident, window, fixed, reading, waiting: of what the name says.
    """

    name: str
    text: str
    ink: str
    faint: str
    tasks: tuple[str, ...]
    resident: str
    window: str
    fixed: str
    reading: str
    waiting: str


LOOKS = (
    Look(
        "light",
        "#2b3038",
        "#ffffff",
        "#c9ced6",
        ("#00796b", "#e0762f", "#5a6fc0"),
        "#00796b",
        "#e0762f",
        "#9aa4b2",
        "#f3c6a0",
        "#c62828",
    ),
    Look(
        "dark",
        "#d7dbe2",
        "#14181f",
        "#4a5160",
        ("#4db6ac", "#ffa15c", "#9fb0f5"),
        "#4db6ac",
        "#ffa15c",
        "#6f7a8c",
        "#8a5a32",
        "#ff6b6b",
    ),
)


@contextmanager
def drawing(look: Look) -> Iterator[None]:
    """matplotlib set up for one look."""
    settings: dict[str, Any] = {
        "svg.fonttype": "none",  # letters stay letters: they can be searched, and read aloud
        "svg.hashsalt": "narrowboat",
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": look.text,
        "axes.labelcolor": look.text,
        "axes.edgecolor": look.faint,
        "axes.titlecolor": look.text,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": look.text,
        "ytick.color": look.text,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "grid.color": look.faint,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "hatch.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        yield


def save(
    name: str, folder: Path, paint: Callable[[Figure, Look], None], size: tuple[float, float] = SIZE
) -> list[Path]:
    """Draw ``concept-NAME-light.svg`` and ``concept-NAME-dark.svg``."""
    made = []
    for look in LOOKS:
        with drawing(look):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure, look)
            path = folder / f"concept-{name}-{look.name}.svg"
            figure.savefig(path, metadata={"Date": None})
            made.append(path)
    return made
