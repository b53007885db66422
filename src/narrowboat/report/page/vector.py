"""Pictures as SVG that follow the reader's light or dark setting, for the ``src`` of an image."""

from __future__ import annotations

import base64
import re
from typing import Any

from narrowboat.report.draw.theme import DARK
from narrowboat.report.picture import picture_bytes

_COLOUR = re.compile("|".join(DARK))


def vector_uri(figure: Any, name: str) -> str:
    """A ``data:`` address. Scripts do not run in an image, and names in it are outlines, not text.

    Args:
        figure: matplotlib's, in the colours of ``draw.theme``.
        name: of the picture, different for each.
    """
    text = picture_bytes(figure, "svg", name).decode("utf-8")
    names = {colour: f"--c{number}" for number, colour in enumerate(DARK)}
    text = _COLOUR.sub(lambda found: f"var({names[found.group()]})", text)
    light = "".join(f"{names[colour]}:{colour};" for colour in DARK)
    dark = "".join(f"{names[colour]}:{other};" for colour, other in DARK.items())
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    begin = text.index(">", text.index("<svg")) + 1
    text = text[:begin] + style + text[begin:]
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode("utf-8")).decode("ascii")
