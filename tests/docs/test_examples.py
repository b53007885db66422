"""Every block of code in the documentation runs as it stands, or says why not; every command in it exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs_kit import (
    LANGUAGES,
    REASONS,
    ROOT,
    RUN,
    Block,
    as_script,
    blocks,
    find_command,
    inline_commands,
    narrowboat_commands,
    options_of,
    pages,
)

PAGES = pages()
_LONG = re.compile(r"long: (tests/\S+\.py)(::\w+)?")


def _named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _runs(page: Path) -> bool:
    return any(not b.skip and b.language in (*RUN, "yaml") for b in blocks(page))


def _groups() -> list[list[Path]]:
    """Two halves of about the same length, a process each: imports are paid for twice, and not by every page."""
    running = [page for page in PAGES if _runs(page)]
    learning = [
        page for page in running if re.search(r"train|tun|task|serv|lp-keep|admission|size|recompute", page.stem)
    ]
    return [[page for page in running if page not in learning], learning]


@pytest.mark.parametrize("group", _groups(), ids=["models", "tasks and training"])
def test_the_examples_run_in_the_order_of_their_page(group: list[Path], tmp_path: Path) -> None:
    environment = os.environ | {"NARROWBOAT_CACHE": str(tmp_path / "cache"), "COLUMNS": "120"}
    told = subprocess.run(
        [sys.executable, ROOT / "tests/docs_kit.py", *group],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-6000:]
    assert set(re.findall(r"^-- (\S+):\d+: ", told.stdout, re.MULTILINE)) == {_named(page) for page in group}


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_a_block_that_is_not_run_says_an_allowed_reason(page: Path) -> None:
    for block in blocks(page):
        if block.language and block.language not in LANGUAGES:
            pytest.fail(f"{block.where}: {block.language!r} is no language of the documentation: {LANGUAGES}")
        if not block.skip or block.skip in REASONS:
            continue
        found = _LONG.fullmatch(block.skip)
        assert found, f"{block.where}: {block.skip!r} is no allowed reason: {REASONS}, or long: tests/PATH"
        source = ROOT / found[1]
        assert source.is_file(), f"{block.where}: there is no {found[1]}"
        if found[2]:
            assert f"def {found[2][2:]}(" in source.read_text(encoding="utf-8"), f"{block.where}: {block.skip}"


def test_most_blocks_run() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language in RUN]
    left_out = [block for block in found if block.skip]
    assert len(left_out) < len(found) / 2, [f"{block.where}: {block.skip}" for block in left_out]


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_every_command_line_is_one_that_the_program_takes(page: Path) -> None:
    for where, arguments in narrowboat_commands(page):
        command, rest = find_command(arguments)
        if getattr(command, "commands", None) is not None:
            assert set(rest) <= options_of(command), where
            continue
        if "--help" in rest:
            continue
        try:
            command.make_context("narrowboat", list(rest))
        except SystemExit as finished:
            assert finished.code == 0, f"{where}: narrowboat {' '.join(arguments)}"
        except Exception as error:
            pytest.fail(f"{where}: narrowboat {' '.join(arguments)}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_every_command_named_in_the_text_exists(page: Path) -> None:
    for where, arguments in inline_commands(page):
        if not re.fullmatch(r"[a-z][a-z-]*", arguments[0].split("|")[0]):
            continue  # such as the name of a whole family
        command, rest = find_command([arguments[0].split("|")[0], *arguments[1:]])
        known = options_of(command)
        for flag in (word.split("=")[0] for word in rest if word.startswith("--")):
            assert flag in known, f"{where}: narrowboat {' '.join(arguments)}: no option {flag}"


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_every_target_of_make_and_every_script_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for block in blocks(page):
        if block.language not in ("", *RUN[1:]):
            continue
        for line in block.code.splitlines():
            words = line.partition(" #")[0].split()
            if words[:1] == ["make"]:
                assert {w for w in words[1:] if "=" not in w} <= targets, f"{block.where}: {line}"
            if words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py") and "/" in words[1]:
                assert (ROOT / words[1]).is_file(), f"{block.where}: there is no {words[1]}"


def test_the_quickstart_is_a_script_for_a_bare_environment() -> None:
    script = as_script(ROOT / "docs/quickstart.md")
    assert "pip install" not in script
    assert script.index("narrowboat zoo save") < script.index("narrowboat run") < script.index("nb.stream(")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_mark_belongs_to_the_block_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docs_kit.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs root -->\n```console\nx\n```\n\n<!-- exit: 1 -->\n<!-- with: small=large -->\n"
        "```sh\nsmall\n```\n\n<!-- before:\na = 1\n-->\n```python\nprint(a)\n```\n"
    )
    first, second, third = blocks(page)
    assert (first.skip, first.line) == ("needs root", 3)
    assert (second.exit, second.runnable(), second.skip) == (1, "large\n", "")
    assert third == Block("page.md", third.line, "python", "print(a)\n", before="a = 1")
    page.write_text("<!-- exit: 1 -->\n\nno code\n")
    with pytest.raises(ValueError, match="before no block"):
        blocks(page)
