"""Write the manual pages from the command line's own help: ``python packaging/man.py`` after a command has changed.

One page for ``narrowboat`` and one for each command, into ``packaging/man``. A test compares; a wheel carries them.

Source: man(7), groff_man(7).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from narrowboat import __version__
from narrowboat.cli.app import COMMANDS, build_command
from narrowboat.cli.tree import Command, Parameter, read_command

FOLDER = Path(__file__).resolve().parent / "man"

_EXIT = (
    ("0", "Done."),
    ("1", "The work failed or was refused; stderr has one line that says what, where, and what to do."),
    ("2", "The command was not used as it can be."),
    ("130", "Interrupted."),
)
_ENVIRONMENT = (
    ("NARROWBOAT_CACHE", "Folder for what was measured of this machine and of networks. Else ~/.cache/narrowboat."),
    ("NARROWBOAT_TOKEN, NARROWBOAT_ADMIN_TOKEN", "Bearer tokens of narrowboat serve, besides those in its file."),
    ("GOMP_SPINCOUNT, OMP_WAIT_POLICY, OMP_NUM_THREADS", "If set, they are left alone; else set before torch loads."),
    ("OTEL_EXPORTER_OTLP_ENDPOINT", "Where narrowboat serve sends its spans."),
)


def pages() -> dict[str, str]:
    """Name of the file: its text."""
    group = build_command()
    found = {f"narrowboat-{name}.1": _page_of_command(name, group.commands[name]) for name in COMMANDS}
    return {"narrowboat.1": _main_page(read_command("narrowboat", group)), **found}


def _main_page(top: Command) -> str:
    lines = [*_head("narrowboat", top.help)]
    lines += [".SH SYNOPSIS", ".B narrowboat", ".I COMMAND", "[\\fIOPTIONS\\fR] [\\fIARGUMENTS\\fR]"]
    lines += [".br", ".B narrowboat", "[\\fB\\-\\-version\\fR [\\fB\\-\\-json\\fR] | \\fB\\-\\-help\\fR]"]
    lines += [".SH DESCRIPTION", *_paragraphs(top.help)]
    lines += [*_paragraphs("A model is package.module:factory with --weights FILE, or a Hugging Face folder.")]
    lines += [".SH COMMANDS"]
    for name, (_, help) in COMMANDS.items():
        lines += [".TP", f".BR narrowboat\\-{_escape(name)} (1)", _text(help)]
    lines += [".SH OPTIONS", *_parameters(top.options)]
    lines += [".SH EXIT STATUS", *_listed(_EXIT), ".SH ENVIRONMENT", *_listed(_ENVIRONMENT)]
    return "\n".join(lines) + "\n"


def _page_of_command(name: str, found: Any) -> str:
    command = read_command(name, found)
    first = re.split(r"(?<=[.:])\s", " ".join(command.help.split()), maxsplit=1)[0]
    lines = [*_head(f"narrowboat-{name}", first), ".SH SYNOPSIS"]
    inner = [(f"narrowboat {name} {part}", read_command(part, one)) for part, one in command.commands.items()]
    leaves = inner or [(f"narrowboat {name}", command)]
    for place, (full, leaf) in enumerate(leaves):
        lines += [*([".br"] if place else []), *_synopsis(full, leaf)]
    lines += [".SH DESCRIPTION", *_paragraphs(command.help)]
    if inner:
        lines.append(".SH COMMANDS")
    for full, leaf in leaves:
        if inner:
            lines += [f'.SS "{_escape(full)}"', *_paragraphs(leaf.help)]
        if leaf.arguments:
            lines += [".SH ARGUMENTS"] if not inner else []
            lines += _parameters(leaf.arguments)
        lines += [".SH OPTIONS"] if not inner else []
        lines += _parameters(leaf.options)
    lines += [".SH EXIT STATUS", "As of", ".BR narrowboat (1).", ".SH SEE ALSO"]
    others = ["narrowboat", *(f"narrowboat-{other}" for other in COMMANDS if other != name)]
    lines += [f".BR {_escape(other)} (1){',' if other != others[-1] else ''}" for other in others]
    return "\n".join(lines) + "\n"


def _head(name: str, help: str) -> Iterator[str]:
    yield ".\\\" Made by packaging/man.py from the command line's help. Change it there."
    yield f'.TH {_escape(name.upper())} 1 "" "narrowboat {__version__}" "narrowboat manual"'
    yield ".nh"
    yield ".ad l"
    yield ".SH NAME"
    yield f"{_escape(name)} \\- {_text(_uncapitalised(help.rstrip('.:')))}"


def _uncapitalised(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text


def _synopsis(full: str, leaf: Command) -> Iterator[str]:
    yield f".B {_escape(full)}"
    if any(not option.required for option in leaf.options):
        yield "[\\fIOPTIONS\\fR]"
    for option in leaf.options:
        if option.required:
            yield f"\\fB{_escape(option.spellings[-1])}\\fR \\fI{_escape(option.value)}\\fR"
    for argument in leaf.arguments:
        shown = f"\\fI{_escape(argument.value)}\\fR" + ("..." if argument.repeated else "")
        yield shown if argument.required else f"[{shown}]"


def _parameters(parameters: tuple[Parameter, ...]) -> Iterator[str]:
    for one in parameters:
        yield ".TP"
        shown = ", ".join(f"\\fB{_escape(spelling)}\\fR" for spelling in one.spellings)
        value = f"\\fI{_escape(one.value)}\\fR" if one.value else ""
        yield " ".join(part for part in (shown, value) if part)
        notes = [f"Default: {one.default}."] if one.default else []
        notes += ["Required."] if one.required and one.spellings else []
        yield _text(" ".join([one.help, *notes])) or "\\&"


def _listed(pairs: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for name, said in pairs:
        yield from (".TP", f".B {_escape(name)}", _text(said))


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        yield from (".PP", _text(paragraph))


def _text(words: str) -> str:
    """Running text: on one line, and no request even if it begins with a dot or a quote."""
    text = _escape(" ".join(words.split()))
    return f"\\&{text}" if text[:1] in (".", "'") else text


def _escape(text: str) -> str:
    marks = {"\\": "\\e", "-": "\\-", "'": "\\(aq", "`": "\\(ga", "^": "\\(ha", "~": "\\(ti", '"': "\\(dq"}
    escaped = "".join(marks.get(mark, mark) for mark in text)
    return "".join(mark if mark.isascii() else f"\\[u{ord(mark):04X}]" for mark in escaped)


def main() -> None:
    """Write every page, and remove those of commands that are gone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="where to write them")
    folder: Path = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="ascii")
    for path in folder.glob("narrowboat*.1"):
        if path.name not in written:
            path.unlink()
    sys.stdout.write(f"wrote {len(written)} pages to {folder}\n")


if __name__ == "__main__":
    main()
