"""An environment of its own, with the wheel and its dependencies and nothing else: the first user's morning."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from packaging_kit import ROOT, build, install, run

pytestmark = pytest.mark.timeout(600)  # PyTorch is installed, by pip


def test_a_bare_install_works_says_what_it_lacks_and_leaves_nothing(tmp_path: Path) -> None:
    built = build(tmp_path / "build")
    environment = tmp_path / "an environment"
    python = install(environment, built.wheel)
    run(python, "-m", "pip", "check")

    told = json.loads(run(python, "-m", "narrowboat", "--version", "--json", cwd=tmp_path))
    assert (told["build"]["commit"], told["build"]["modified"]) == (built.commit, False)
    assert told["extras"]["serve"] is False
    assert told["location"].startswith(str(environment))

    work = tmp_path / "work here"
    said = run(sys.executable, ROOT / "packaging" / "smoke.py", "--python", python, "--work", work, seconds=400)
    assert [line.split()[0] for line in said.splitlines()] == [
        *("imports", "version", "helps", "machine", "network", "extras", "completions")
    ]

    run(python, "-m", "pip", "uninstall", "--quiet", "--yes", "narrowboat")
    left = [path for path in environment.rglob("*narrowboat*") if "__pycache__" not in path.parts]
    assert left == []
