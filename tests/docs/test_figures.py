"""The figures of the concept pages are drawn by the planner and the simulator, as they are today."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs_kit import ROOT

pytest.importorskip("matplotlib")
IMAGES = ROOT / "docs/images"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    subprocess.run([sys.executable, ROOT / "docs/figures/make.py", folder], check=True, timeout=120)
    return folder


def _said(path: Path) -> list[str]:
    """The words and numbers of a drawing."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))


def test_the_drawings_in_the_repository_are_those_of_this_code(drawn: Path) -> None:
    made = sorted(path.name for path in drawn.iterdir())
    assert made == sorted(path.name for path in IMAGES.glob("concept-*-*.svg"))
    for name in made:
        assert _said(drawn / name), name
        assert _said(drawn / name) == _said(IMAGES / name), f"{name}: python docs/figures/make.py"


def test_every_drawing_is_shown_in_both_looks() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/concepts").glob("*.md"))
    for path in IMAGES.glob("concept-*-*.svg"):
        look = path.stem.rpartition("-")[2]
        assert f"{path.name}#gh-{look}-mode-only" in pages, path.name


def test_the_text_beside_a_drawing_says_what_it_shows(drawn: Path) -> None:
    said = " ".join(_said(drawn / "concept-lp-keep-light.svg"))
    text = " ".join((ROOT / "docs/concepts/lp-keep.md").read_text(encoding="utf-8").split())
    for response, peak in re.findall(r"after (\d+) ms; (\d+) MiB", said):
        assert f"{response} ms" in text
        assert f"{peak} MiB" in text or f"of {peak}" in text
