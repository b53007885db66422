"""Sections to HTML: a template that escapes whatever it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from narrowboat import __version__
from narrowboat.errors import UsageError
from narrowboat.report.sections.section import Finding, Table

_WORDS = {"good": "good", "note": "note", "bad": "attention"}
_MOST = 4  # findings of each section above all


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture as the page has it.

    Attributes:
        title, alt, caption: as of ``Picture``.
        wide, narrow: ``data:`` addresses of the picture for a page, and for a phone.
    """

    title: str
    alt: str
    caption: str
    wide: str
    narrow: str


@dataclass(frozen=True, slots=True)
class Part:
    """A section as the page has it."""

    title: str
    kind: str
    file: str
    findings: Sequence[Finding]
    pictures: Sequence[Shown]
    tables: Sequence[Table]
    facts: dict[str, str]


def require_jinja() -> Any:
    """The module.

    Raises:
        UsageError: it is not installed; names the extra.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UsageError("reports need Jinja2: pip install 'narrowboat[plot]'") from error
    return jinja2


def render_page(title: str, parts: Sequence[Part]) -> str:
    """The whole document.

    Args:
        title: of the page.
        parts: in order.
    """
    jinja2 = require_jinja()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    folder = resources.files("narrowboat.report.page")
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    from markupsafe import Markup

    text: str = template.render(
        title=title,
        sections=parts,
        words=_WORDS,
        most=_MOST,
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        version=__version__,
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    # What no encoding of text can hold (a lone half of a surrogate pair, from JSON) is replaced.
    return text.encode("utf-8", "replace").decode("utf-8")
