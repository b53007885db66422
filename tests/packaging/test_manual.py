"""The manual pages are what the command line says of itself, and typeset without a complaint."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from types import ModuleType

import pytest

from narrowboat.cli.app import COMMANDS, build_command
from narrowboat.cli.tree import read_command
from packaging_kit import ROOT

FOLDER = ROOT / "packaging" / "man"
PAGES = sorted(FOLDER.glob("*.1"))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("narrowboat_packaging_man", ROOT / "packaging" / "man.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_are_up_to_date(generator: ModuleType) -> None:
    written = {path.name: path.read_text(encoding="ascii") for path in PAGES}
    made = generator.pages()
    stale = sorted(name for name in written.keys() | made.keys() if written.get(name) != made.get(name))
    assert stale == [], "the command line's help has changed: run `python packaging/man.py`"


def test_every_command_and_every_option_has_its_place(generator: ModuleType) -> None:
    pages = generator.pages()
    assert set(pages) == {"narrowboat.1", *(f"narrowboat-{name}.1" for name in COMMANDS)}
    for name, found in build_command().commands.items():
        command = read_command(name, found)
        leaves = [read_command(part, one) for part, one in command.commands.items()] or [command]
        for leaf in leaves:
            for option in leaf.options:
                for spelling in option.spellings:
                    assert spelling.replace("-", "\\-") in pages[f"narrowboat-{name}.1"]


@pytest.mark.parametrize(
    ("text", "typeset"),
    [(".so /etc/passwd", "\\&.so /etc/passwd"), ("'x", "\\(aqx"), ("a\\b\n c-d", "a\\eb c\\-d"), ("µs", "\\[u00B5]s")],
)
def test_no_help_text_is_taken_for_a_request(generator: ModuleType, text: str, typeset: str) -> None:
    assert generator._text(text) == typeset


def test_man_finds_nothing_to_warn_of() -> None:
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("man or groff is not installed")
    environment = {**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": "", "PAGER": "cat"}
    command = ["man", "--warnings", "-l", *map(str, PAGES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    if "has been minimized" in done.stdout:
        pytest.skip("this system's man is a stand-in")
    assert (done.returncode, done.stderr) == (0, "")
    assert "EXIT STATUS" in done.stdout and "narrowboat zoo save" in " ".join(done.stdout.split())
