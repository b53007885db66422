"""What a copy was made from: a checkout asks git, anything else has it in a file, and neither has to be there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from narrowboat.machine import build
from narrowboat.machine.build import BuildFacts, build_facts, facts_for_a_build, facts_of_checkout, write_facts

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def _git(root: Path, *arguments: str) -> str:
    command = [
        "git",
        "-C",
        str(root),
        "-c",
        "user.name=n",
        "-c",
        "user.email=n@localhost",
        "-c",
        "commit.gpgsign=false",
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "a checkout"
    (root / "src" / "narrowboat").mkdir(parents=True)
    (root / "src" / "narrowboat" / "__init__.py").write_text("")
    (root / "notes.txt").write_text("")
    _git(tmp_path, "init", "--quiet", str(root))
    _git(root, "add", "--all")
    _git(root, "commit", "--quiet", "--message", "first")
    return root


@needs_git
def test_a_checkout_tells_its_commit_and_that_it_is_unchanged(checkout: Path) -> None:
    facts = build_facts(checkout / "src" / "narrowboat")
    assert facts.commit == _git(checkout, "rev-parse", "HEAD").strip()
    assert (facts.modified, facts.built) == (False, None)
    assert facts.committed is not None and facts.committed.startswith("20")


@needs_git
@pytest.mark.parametrize("name", ["src/narrowboat/__init__.py", "src/narrowboat/new.py"])
def test_what_is_shipped_and_differs_is_told(checkout: Path, name: str) -> None:
    (checkout / name).write_text("changed = True\n")
    facts = facts_of_checkout(checkout)
    assert facts is not None and facts.modified is True


@needs_git
def test_what_is_not_shipped_may_differ(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("buy coal")
    facts = facts_of_checkout(checkout)
    assert facts is not None and facts.modified is False


@needs_git
def test_asking_leaves_the_index_alone(checkout: Path) -> None:
    index = checkout / ".git" / "index"
    os.utime(checkout / "src" / "narrowboat" / "__init__.py", (1, 1))  # git would like to note that
    before = (index.stat().st_mtime_ns, index.read_bytes())
    facts_of_checkout(checkout)
    assert (index.stat().st_mtime_ns, index.read_bytes()) == before


@needs_git
def test_a_folder_inside_somebody_elses_repository_does_not_take_their_commit(checkout: Path) -> None:
    inner = checkout / "vendor" / "src" / "narrowboat"
    inner.mkdir(parents=True)
    assert build_facts(inner) == BuildFacts()


@needs_git
def test_variables_of_a_git_hook_do_not_lead_elsewhere(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = facts_of_checkout(checkout)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert facts_of_checkout(checkout) == want


@needs_git
def test_without_git_nothing_is_known_and_nothing_fails(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert build_facts(checkout / "src" / "narrowboat") == BuildFacts()


def test_what_a_build_wrote_is_read_back(tmp_path: Path) -> None:
    facts = BuildFacts("ab" * 20, "2026-11-23T07:10:00+00:00", True, "2026-11-23T08:00:00Z")
    package = tmp_path / "lib" / "narrowboat"
    package.mkdir(parents=True)
    write_facts(facts, package)
    assert build_facts(package) == facts


@pytest.mark.parametrize("text", ["", "{", "[]", '{"commit": 5, "modified": "yes"}', "\xff"])
def test_a_damaged_record_is_no_reason_to_fail(tmp_path: Path, text: str) -> None:
    package = tmp_path / "lib" / "narrowboat"
    package.mkdir(parents=True)
    (package / build.RECORD).write_bytes(text.encode("latin-1"))
    assert build_facts(package) == BuildFacts()


def test_a_build_from_a_source_distribution_keeps_the_commit_and_takes_the_time_it_is_told(tmp_path: Path) -> None:
    package = tmp_path / "src" / "narrowboat"
    package.mkdir(parents=True)
    write_facts(BuildFacts("cd" * 20, None, False, "2020-01-01T00:00:00Z"), package)
    facts = facts_for_a_build(tmp_path, {"SOURCE_DATE_EPOCH": "86400"})
    assert facts == BuildFacts("cd" * 20, None, False, "1970-01-02T00:00:00Z")
