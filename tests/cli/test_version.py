"""``narrowboat --version``: which copy this is, quickly."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from narrowboat import __version__
from narrowboat.cli import version
from narrowboat.machine.build import BuildFacts


def test_the_first_line_is_the_name_and_the_version(narrowboat: Any) -> None:
    finished = narrowboat("--version")
    assert finished.code == 0
    assert finished.out.splitlines()[0] == f"narrowboat {__version__}"
    assert metadata.version("torch") in finished.out


@pytest.mark.parametrize("arguments", [("--version", "--json"), ("--json", "--version")])
def test_with_json_it_is_one_document_in_either_order(narrowboat: Any, arguments: tuple[str, ...]) -> None:
    told = narrowboat(*arguments).json()
    assert told["narrowboat"] == __version__
    assert told["libraries"]["torch"] == metadata.version("torch")
    assert set(told["build"]) == {"commit", "committed", "modified", "built"}


@pytest.mark.parametrize("arguments", [("--json",), ("--json", "zoo", "list")])
def test_json_before_a_command_is_refused_rather_than_ignored(narrowboat: Any, arguments: tuple[str, ...]) -> None:
    assert narrowboat(*arguments).code == 2


def test_nothing_slow_is_imported() -> None:
    code = """
import sys
from narrowboat.cli.main import main
try:
    main(["--version", *sys.argv[1:]])
except SystemExit as finished:
    print(sorted({"torch", "numpy", "pydantic", "yaml", "safetensors"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (BuildFacts(), "not known"),
        (BuildFacts("0123456789abcdef", "2026-11-23T07:10:00+00:00", False), "0123456789ab of 2026-11-23"),
        (BuildFacts("0123456789abcdef", None, True), "0123456789ab, with changes"),
        (BuildFacts("0123456789abcdef", None, None), "0123456789ab, perhaps with changes"),
    ],
)
def test_a_commit_in_words(facts: BuildFacts, said: str) -> None:
    assert version.in_words(facts) == said


def _distribution(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution ``lighter`` with extras, one of whose packages is there."""
    for name, lines in {
        "lighter": (
            "Provides-Extra: whole\nProvides-Extra: half\nProvides-Extra: both\nProvides-Extra: dev\n"
            'Requires-Dist: always>=1\nRequires-Dist: oar>=2; extra == "whole"\n'
            "Requires-Dist: oar[thick]>=2; python_version >= '3.8' and extra == 'half'\n"
            'Requires-Dist: sail; extra == "half"\nRequires-Dist: lighter[whole,half]; extra == "both"\n'
        ),
        "oar": "",
    }.items():
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n{lines}")
    monkeypatch.syspath_prepend(str(folder))


def test_an_extra_is_there_when_all_its_packages_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _distribution(tmp_path, monkeypatch)
    assert version.installed_extras("lighter") == {"whole": True, "half": False, "both": False}


def test_extras_are_not_known_of_what_is_not_installed() -> None:
    assert version.installed_extras("no-such-distribution-here") is None


def test_the_module_prints_what_the_script_prints(narrowboat: Any) -> None:
    command = [sys.executable, "-m", "narrowboat", "--version", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["build"] == narrowboat("--version", "--json").json()["build"]
