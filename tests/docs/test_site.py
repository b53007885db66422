"""The site builds without a warning, links included; it fetches nothing from elsewhere; what is generated is whole."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest

import narrowboat as nb
from docs_kit import ROOT

pytest.importorskip("mkdocs", reason="needs narrowboat[docs]")


def _build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    told = _build(ROOT, folder)
    assert told.returncode == 0, told.stdout + told.stderr
    return folder


def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Addresses(HTMLParser):
    """What a browser fetches by itself, and what a reader may click on."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") and told.get("src"):
            self.fetched.append(str(told["src"]))
        if tag == "link" and told.get("rel") not in ("canonical", "prev", "next", "edit"):
            self.fetched.append(str(told.get("href")))
        if tag == "a" and told.get("href"):
            self.links.append(str(told["href"]))


def _addresses(page: Path) -> _Addresses:
    found = _Addresses()
    found.feed(page.read_text(encoding="utf-8"))
    return found


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    outside = {(page.name, at) for page in pages for at in _addresses(page).fetched if urlsplit(at).netloc}
    assert not outside
    sheets = "".join(sheet.read_text(encoding="utf-8") for sheet in site.rglob("*.css"))
    assert not re.findall(r"url\(\s*['\"]?https?:", sheets)


def test_links_to_elsewhere_are_well_formed(site: Path) -> None:
    for page in site.rglob("*.html"):
        for link in _addresses(page).links:
            parts = urlsplit(link)
            assert parts.scheme in ("", "https", "http", "mailto"), (page, link)
            assert not parts.netloc or re.fullmatch(r"[\w.-]+\.\w+(:\d+)?|127\.0\.0\.1:\d+", parts.netloc), (
                page,
                link,
            )


def test_a_link_to_a_heading_that_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    validation = re.search(r"^validation:\n(?:  .*\n)+", config, re.MULTILINE)
    assert validation is not None
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{validation[0]}")
    index = tmp_path / "docs/index.md"
    index.write_text("# A\n\n[there](#a)\n")
    assert _build(tmp_path, tmp_path / "out").returncode == 0
    for wrong in ("[gone](#b)", "[gone](other.md)", "[root](/x.md)"):
        index.write_text(f"# A\n\n{wrong}\n")
        assert _build(tmp_path, tmp_path / "out").returncode != 0, wrong


def test_the_reference_has_every_command_field_and_error(site: Path) -> None:
    from narrowboat import errors
    from narrowboat.cli.app import COMMANDS
    from narrowboat.tasks.spec import schema

    told = {name: (site / f"reference/{name}/index.html").read_text(encoding="utf-8") for name in _GENERATED}
    for command in COMMANDS:
        assert f"narrowboat {command}" in told["command-line"], command
    for model in (schema.TasksSpec, schema.TaskSpec, schema.BlockSpec, schema.InputSpec, schema.Contract):
        for field in model.model_fields:
            assert f"<code>{field}</code>" in told["tasks-yaml"], field
    for name in (n for n, kind in vars(errors).items() if isinstance(kind, type) and n.endswith("Error")):
        assert name in told["errors"], name
    for text in told.values():
        assert "generated:" not in text


_GENERATED = ("command-line", "tasks-yaml", "errors", "streaming")


def test_every_public_name_has_an_entry(site: Path) -> None:
    told = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("index.html"))
    for name in (n for n in nb.__all__ if n != "errors"):
        assert re.search(rf'id="narrowboat\.[\w.]*\b{name}"|<code>{name}</code>', told), name


def test_every_field_of_tasks_yaml_is_told_in_words() -> None:
    rows = [line for line in hooks().tasks_fields().splitlines() if line.startswith("| `")]
    assert len(rows) > 40
    assert not [row for row in rows if row.rstrip(" |").endswith("|") or row.split("|")[-2].strip() == ""]


def test_every_key_of_the_statistics_is_in_their_table(deep: Any) -> None:
    told = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| `\w+` .*", hooks().stats(), re.MULTILINE))))
    assert set(nb.session(deep.stream()).stats()) - {"fixed_parts"} <= told
    assert "fixed_parts" in hooks().stats()  # in words, beside fixed_bytes
