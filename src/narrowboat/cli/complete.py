"""What could be typed next: asked by the shells' completion scripts, answered without importing torch.

``narrowboat __complete WORD... INCOMPLETE`` prints the words that begin with INCOMPLETE, one a line, each with a tab
and what it means; a line ``:files`` or ``:folders`` says that names of files or folders go there too. bash takes words
apart at colons, so it hands over its line instead: ``__complete --line LINE BREAKS``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from narrowboat.cli.tree import Command, Parameter, read_command

ASKED = "__complete"
"""The first argument that means that a shell asks."""

FILES, FOLDERS = ":files", ":folders"

Words = Iterator[tuple[str, str]]


def _zoo_names() -> Words:
    from narrowboat.zoo import MODELS

    for model in MODELS.values():
        yield model.name, model.description


def _zoo_models() -> Words:
    for name, description in _zoo_names():
        yield f"narrowboat.zoo:{name}", description


def _devices() -> Words:
    yield "cpu", "this machine's processor and memory"
    yield "cuda", "the first NVIDIA GPU"
    yield "emulated:6GiB:12GB", "6 GiB behind a bus of 12 GB/s, on the processor"


_BY_PLACE: dict[tuple[str, str], Callable[[], Words]] = {
    ("zoo save", "name"): _zoo_names,
    ("", "--device"): _devices,
}
"""Values that neither their type nor what stands for them says: by command (any if empty) and name or spelling."""


def answer(arguments: Sequence[str], command: Any) -> list[str]:
    """The lines to print for the words after ``__complete``; ``command`` is the whole command line."""
    words, cut = list(arguments), 0
    if words[:1] == ["--line"]:
        line, breaks = (*words[1:], "", "")[:2]
        words, quoted = split_line(line)
        words = words[1:]
        if words and not quoted:  # the shell replaces what stands behind the last break only
            cut = 1 + max(words[-1].rfind(mark) for mark in ":=" if mark in breaks or mark == "=")
            cut = cut if any(mark in breaks for mark in words[-1][cut - 1 : cut]) else 0
    *before, incomplete = words or [""]
    lines = []
    for value, help in candidates(before, incomplete, command):
        if value in (FILES, FOLDERS):
            lines.append(value)
        elif value.startswith(incomplete):
            lines.append(f"{value[cut:]}\t{' '.join(help.split())}")
    return lines


def split_line(line: str) -> tuple[list[str], bool]:
    """The words of a command line as typed so far, the last one unfinished; and whether it stands in open quotes."""
    if (len(line) - len(line.rstrip("\\"))) % 2:  # what it would mask is not typed yet
        line = line[:-1]
    for closing in ("", "'", '"'):
        try:
            words = shlex.split(line + closing)
        except ValueError:
            continue
        if not closing and (not line or (line[-1].isspace() and not line.endswith("\\ "))):
            words.append("")
        return words, bool(closing)
    return line.split(), False  # nothing is known that ends here


def candidates(before: Sequence[str], incomplete: str, command: Any) -> Words:
    """(word, meaning) for what may come after the words ``before``; not yet held against what is typed of it."""
    place, here = [], read_command("narrowboat", command)
    positional, waiting, only_arguments, given = 0, None, False, set()
    for word in before:
        if waiting is not None:
            waiting = None
        elif word == "--" and not only_arguments:
            only_arguments = True
        elif word.startswith("-") and not only_arguments:
            option = _option(here, word.partition("=")[0])
            if option is not None:
                given.add(option.name)
                waiting = option if option.value and "=" not in word else None
        elif word in here.commands:
            here = read_command(word, here.commands[word])
            place.append(word)
            positional, given = 0, set()
        else:
            positional += 1
    path = " ".join(place)
    name, equals, _ = incomplete.partition("=")
    if waiting is not None:
        yield from _values(path, waiting)
    elif incomplete.startswith("--") and equals and not only_arguments:
        option = _option(here, name)
        if option is not None and option.value:
            for value, help in _values(path, option):
                yield (value if value.startswith(":") else f"{name}={value}"), help
    elif incomplete.startswith("-") and not only_arguments:
        for option in here.options:
            if option.repeated or option.name not in given:
                yield from ((spelling, option.help) for spelling in option.spellings)
    elif here.commands:
        yield from _commands(here)
    else:
        yield from _values_of_argument(path, here, positional)


def _commands(here: Command) -> Words:
    for name, command in here.commands.items():
        yield name, (command.help or "").partition("\n")[0]


def _option(here: Command, spelling: str) -> Parameter | None:
    return next((option for option in here.options if spelling in option.spellings), None)


def _values_of_argument(path: str, here: Command, positional: int) -> Words:
    arguments = here.arguments
    if positional < len(arguments):
        yield from _values(path, arguments[positional])
    elif arguments and arguments[-1].repeated:
        yield from _values(path, arguments[-1])


def _values(path: str, parameter: Parameter) -> Words:
    for choice in parameter.choices:
        yield choice, ""
    for name in (parameter.name, *parameter.spellings):
        known = _BY_PLACE.get((path, name)) or _BY_PLACE.get(("", name))
        if known is not None:
            yield from known()
    stands_for = parameter.value.upper()
    if stands_for == "MODEL":
        yield from _zoo_models()
        yield FOLDERS, ""
    elif stands_for.startswith("FOLDER"):
        yield FOLDERS, ""
    elif stands_for.startswith(("FILE", "SOURCE", "RUN", "DATA")) or "." in stands_for:
        yield FILES, ""
