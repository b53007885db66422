"""The code blocks of the documentation: found, checked against the program, and run as they stand.

In the pages, HTML comments (which no reader sees) say how the block behind them is to be taken:

    <!-- not run: REASON -->    it is left out; REASON is one of REASONS, or "long: tests/PATH": what runs its like
    <!-- exit: 1 -->            its commands end with that exit code
    <!-- before:                Python that a reader would have already: run before the block
    CODE
    -->
    <!-- with: OLD=NEW, ... --> words to be replaced before it is run: smaller networks, other paths

The blocks of a page run in order, in an empty folder. ``narrowboat`` commands are called in the same process, as its
imports take longer than the work; other commands run in a shell. As a program, this file runs pages one after another:
``python tests/docs_kit.py PAGE ...``; with ``--script`` it prints the page as a script for bash instead, for an
environment that has nothing but the wheel.
"""

from __future__ import annotations

import gc
import os
import re
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RUN = ("python", "console", "sh", "bash")
LANGUAGES = (*RUN, "yaml", "text", "json", "ini", "toml", "dockerfile")
REASONS = (
    "needs a GPU",
    "needs root",
    "needs another machine",
    "needs a container runtime",
    "needs a package index",
    "needs an extra that CI does not install",
    "shows output",
    "no tasks.yaml",
)
_ONCE = ("doctor --quick",)  # it says the same wherever it is asked, after seconds
_done: set[str] = set()
_MARK = re.compile(r"<!--\s*(not run|exit|before|with):(.*?)-->", re.DOTALL)
_SHELL = re.compile(r"[|<>&;$`]")


@dataclass
class Block:
    """One block of code.

    Attributes:
        page: where it stands, from the repository's root.
        line: of its first line of code, from 1.
        language: as the fence says; ``""`` for an indented block.
        code: its text.
        skip: why it is not run; empty if it is.
        exit: the exit code its commands end with.
        before: Python to run first.
        words: what is replaced by what.
    """

    page: str
    line: int
    language: str
    code: str
    skip: str = ""
    exit: int = 0
    before: str = ""
    words: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """``page:line``."""
        return f"{self.page}:{self.line}"

    def runnable(self) -> str:
        """The code with its words replaced."""
        code = self.code
        for old, new in self.words.items():
            if old not in code:
                raise ValueError(f"{self.where}: there is no {old!r} to be replaced")
            code = code.replace(old, new)
        return code


def pages() -> list[Path]:
    """Every page a reader meets: README, CONTRIBUTING and all of docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The page's blocks of code in order, each with the marks before it.

    Raises:
        ValueError: a mark stands before no block, or says something unknown.
    """
    from markdown_it import MarkdownIt

    name = str(page.relative_to(ROOT))
    found: list[Block] = []
    marks: list[tuple[str, str]] = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        line = (token.map or [0])[0]
        if token.type == "html_block" and (told := _MARK.findall(token.content)):
            marks += told
        elif token.type in ("fence", "code_block"):
            fenced = token.type == "fence"
            language = token.info.split()[0] if fenced and token.info else ""
            block = Block(name, line + 1 + fenced, language, token.content)
            for kind, said in marks:
                _apply(block, kind, said)
            marks = []
            found.append(block)
        elif marks:
            raise ValueError(f"{name}:{line + 1}: the mark {marks[0]} stands before no block of code")
    return found


def _apply(block: Block, kind: str, said: str) -> None:
    if kind == "not run":
        block.skip = said.strip()
    elif kind == "exit":
        block.exit = int(said)
    elif kind == "before":
        block.before = said.strip("\n")
    else:
        pairs = (pair.partition("=") for pair in said.split(", "))
        block.words = {old.strip(): new.strip() for old, _, new in pairs}


def lines(block: Block) -> Iterator[str]:
    """The commands of a block for a shell, continued lines joined, comments and prompts left out."""
    text = block.code.replace("\\\n", " ")
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ")
        if line and not line.startswith("#"):
            yield line


def narrowboat_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """``(where, arguments)`` of every ``narrowboat ...`` in the page's blocks for a shell, indented ones included."""
    for block in blocks(page):
        if block.language in ("", *RUN[1:]):
            for line in lines(block):
                for words in _simple(line):
                    if words[:1] == ["narrowboat"]:
                        yield block.where, words[1:]


def inline_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The same of what stands in the text as code, such as ``narrowboat tasks check``."""
    from markdown_it import MarkdownIt

    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            if child.type == "code_inline" and child.content.startswith("narrowboat "):
                yield f"{page.relative_to(ROOT)}:{(token.map or [0])[0] + 1}", child.content.split()[1:]


def _simple(line: str) -> Iterator[list[str]]:
    """The simple commands of a line: words between ``&&``, ``|`` and the like, without redirections."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:  # a quote that goes on in the next line
        return
    current: list[str] = []
    for word in words:
        if word in (">", ">>", "<"):
            break
        if set(word) <= set("|&;()"):
            yield current
            current = []
        else:
            current.append(word)
    yield current


def find_command(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command that ``narrowboat ARGUMENTS`` calls, and what is left for it.

    Raises:
        LookupError: there is no such command.
    """
    from narrowboat.cli.app import build_command

    command: Any = build_command()
    rest = list(arguments)
    while True:
        if hasattr(command, "_load"):
            command = command._load()
        inner = getattr(command, "commands", None)
        if inner is None or not rest or rest[0].startswith("-"):
            return command, rest
        if rest[0] not in inner:
            raise LookupError(f"narrowboat has no command {' '.join(arguments[: len(arguments) - len(rest) + 1])!r}")
        command = inner[rest.pop(0)]


def options_of(command: Any) -> set[str]:
    """Every option of a command, ``--help`` included."""
    known = {"--help", "--version"}
    for parameter in command.params:
        known |= {flag for flag in (*parameter.opts, *parameter.secondary_opts) if flag.startswith("-")}
    return known


def run_pages(asked: list[Path]) -> bool:
    """Run the pages' blocks, each page in an empty folder of its own below the present one; whether all went well."""
    home, well = Path.cwd(), True
    for page in asked:
        folder = home / page.relative_to(ROOT).with_suffix("")
        folder.mkdir(parents=True)
        os.chdir(folder)
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(page):
            if block.skip or block.language not in (*RUN, "yaml"):
                continue
            began = time.perf_counter()
            try:
                _run(block, namespace)
            except BaseException as error:
                traceback.print_exc()
                print(f"FAILED {block.where}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                well = False
                break
            print(f"-- {block.where}: {time.perf_counter() - began:.1f} s", flush=True)
        namespace.clear()
        gc.collect()  # what a page has streamed is not the next one's
    return well


def _run(block: Block, namespace: dict[str, Any]) -> None:
    if block.before:
        exec(compile(block.before, f"{block.where} (before)", "exec"), namespace)
    if block.language == "python":
        code = compile("\n" * (block.line - 1) + block.runnable(), block.page, "exec", dont_inherit=True)
        exec(code, namespace)
    elif block.language == "yaml":
        _keep_yaml(block)
    else:
        for line in lines(Block(**{**vars(block), "code": block.runnable()})):
            _command(line, block.exit)


def _keep_yaml(block: Block) -> None:
    """A description of tasks is read by the real schema; one with a name becomes the file of that name."""
    from narrowboat.tasks.spec.load import load_tasks

    name = re.match(r"#\s*([\w.-]+\.yaml)\s*$", block.code.splitlines()[0])
    path = Path(name[1] if name else "unnamed.yaml")
    path.write_text(block.runnable(), encoding="utf-8")
    load_tasks(path)


def _command(line: str, wanted: int) -> None:
    words = next(_simple(line), [])
    if (said := " ".join(words[1:])) in _ONCE and said in _done:
        return
    _done.add(said)
    if words[:1] == ["narrowboat"] and not _SHELL.search(line.partition(" #")[0]):
        from narrowboat.cli.main import main

        try:
            main(words[1:])
        except SystemExit as finished:
            code = finished.code or 0
    else:
        code = subprocess.run(["bash", "-euc", line], check=False).returncode
    if code != wanted:
        raise RuntimeError(f"{line!r} ended with exit code {code}, not {wanted}")


def as_script(page: Path) -> str:
    """The page as one script for bash, for a bare environment: blocks that need an index are left out."""
    parts, python = ["set -eu"], ""
    for block in blocks(page):
        if block.skip or block.language not in RUN:
            continue
        if block.language == "python":
            python += block.runnable()
        else:
            parts += [*_heredoc(python), block.runnable().rstrip()]
            python = ""
    return "\n".join([*parts, *_heredoc(python)]) + "\n"


def _heredoc(code: str) -> list[str]:
    return ["python - <<'END_OF_PYTHON'", code.rstrip(), "END_OF_PYTHON"] if code else []


if __name__ == "__main__":
    named = [Path(name).resolve() for name in sys.argv[1:] if name != "--script"]
    if "--script" in sys.argv:
        sys.stdout.write("".join(as_script(page) for page in named))
    elif not run_pages(named):
        sys.exit(1)
