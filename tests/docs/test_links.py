"""Links of every page as it lies in the repository; mkdocs does not look at README and CONTRIBUTING."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

from docs_kit import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
_FROM_THE_SITE = {"contributing.md"}  # made when the site is built


def _links(page: Path) -> list[str]:
    found = []
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                found.append(str(target))
    return found


def _anchors(page: Path) -> set[str]:
    """Of headings, as the site and code forges make them; and those that are written out."""
    text = page.read_text(encoding="utf-8")
    tokens = MarkdownIt().parse(text)
    slugs = {_slug(inline.content) for heading, inline in pairwise(tokens) if heading.type == "heading_open"}
    return slugs | set(re.findall(r"\{ *#([\w-]+) *\}", text))


def _slug(heading: str) -> str:
    plain = re.sub(r"[`*]|\]\([^)]*\)|\{.*\}|\[", "", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for link in _links(page):
        if re.match(r"[a-z]+:", link):
            assert re.match(r"(https?://[\w.-]+(:\d+)?(/|$)|mailto:)", link), f"{page}: {link}"
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.name in _FROM_THE_SITE:
            continue
        assert target.exists(), f"{page}: there is no {link}"
        assert target.is_relative_to(ROOT), f"{page}: {link} leads out of the repository"
        generated = "generated:" in target.read_text(encoding="utf-8") if target.suffix == ".md" else True
        if anchor and not generated:
            assert anchor in _anchors(target), f"{page}: {link} has no such heading"
