"""What mkdocs is helped with: pages made from the program itself, so that they cannot go stale.

``<!-- generated: NAME -->`` in a page stands for what :data:`MAKERS` says of that name. ``contributing.md`` is the
repository's CONTRIBUTING.md with its links turned to the site's.
"""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"<!-- generated: ([a-z-]+) -->")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page that lies outside ``docs/``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "contributing.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what is generated."""
    return _MARK.sub(lambda found: MAKERS[found[1]](), markdown)


def commands() -> str:
    """Every command of the command line with its arguments and options."""
    from narrowboat.cli.app import build_command

    parts = []
    for name, command in sorted(_leaves(build_command(), "narrowboat")):
        operands = " ".join(_operand(p) for p in command.params if _is_argument(p))
        flags = [p for p in command.params if not _is_argument(p) and not p.hidden]
        usage = f"{name} [OPTIONS]" if flags else name
        parts += [f"## {name}", "", _paragraphs(command.help or ""), "", "```text", f"{usage} {operands}".rstrip()]
        parts += ["```", "", "| argument, option | takes | |", "| --- | --- | --- |"]
        parts += [_row(p) for p in [*(p for p in command.params if _is_argument(p)), *flags]]
        parts.append("")
    return "\n".join(parts)


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Commands that do something, by their full names."""
    if hasattr(command, "_load"):
        command = command._load()
    if not hasattr(command, "commands"):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from _leaves(inner, f"{name} {part}")


def _is_argument(parameter: Any) -> bool:
    return type(parameter).__name__ == "TyperArgument"


def _operand(parameter: Any) -> str:
    said = _shown(parameter)
    return said if parameter.required else f"[{said}]"


def _shown(parameter: Any) -> str:
    """What stands for the value: its metavar, its choices, or its kind."""
    if parameter.metavar:
        return str(parameter.metavar)
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(str(member.value) for member in kind)
    if _is_argument(parameter):
        return str(parameter.name).upper()
    return "" if kind is bool else str(getattr(kind, "__name__", kind)).upper()


def _row(parameter: Any) -> str:
    shown = _shown(parameter)
    if _is_argument(parameter):
        named, kind = _code(shown), ""
    else:
        named = ", ".join(_code(flag) for flag in [*parameter.opts, *parameter.secondary_opts])
        kind = _code(shown) if shown else ""
    default = parameter.default
    note = " *(required)*" if parameter.required else ""
    if default is not None and default is not False and not callable(default):
        note = f" *(default {_code(str(getattr(default, 'value', default)))})*"
    return f"| {named} | {kind} | {_cell(parameter.help or '')}{note} |"


def _code(text: str) -> str:
    """In a table's cell, which a bar would end."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def _cell(text: str) -> str:
    """Text for a cell of a table: no bar, no tag, one line."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def tasks_fields() -> str:
    """Every field of ``tasks.yaml`` by the part of the file it stands in, from the schema's own descriptions."""
    from narrowboat.tasks.spec import schema

    parts = []
    for model, title in (
        (schema.TasksSpec, "The file"),
        (schema.TaskSpec, "A task: `tasks:`"),
        (schema.InputSpec, "Inputs: `input:`"),
        (schema.Contract, "A token bucket: `contract:`"),
        (schema.BlockSpec, "A described block: `blocks:`"),
        (schema.SupplySpec, "The processor: `supply:`"),
        (schema.StorageSpec, "The storage: `storage:`"),
    ):
        told = (model.__doc__ or "").strip()
        parts += [f"## {title}", "", told.replace("``", "`"), "", "| field | takes | if left out | |"]
        parts += ["| --- | --- | --- | --- |", *_fields(model), ""]
    return "\n".join(parts)


def _fields(model: Any) -> Iterator[str]:
    definition = model.model_json_schema()
    for name, field in model.model_fields.items():
        told = definition["properties"][name]
        left_out = "*required*" if field.is_required() else _left_out(name, field.default)
        said = field.description or _SAID.get(name, "")
        yield f"| `{name}` | {_takes(told, definition)} | {left_out} | {_cell(said)} |"


# Fields whose name says it, and whose part of the file is told below.
_SAID = {
    "name": "Letters, digits, `_`, `.` and `-`, 64 of them at most; no other task has it.",
    "guarantee": "Deadlines that are promised; or what is left, delaying others by a block at most.",
    "supply": "What of the processor is there for the tasks.",
    "storage": "Where it is known better than measured.",
    "tasks": "From 1 to 256 of them.",
}


def _left_out(name: str, default: Any) -> str:
    from pydantic import BaseModel

    if default is None or isinstance(default, BaseModel):
        return ""
    if name == "calibration":  # the schema has microseconds
        return f"`{default / 1e6:g}s`"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _takes(told: dict[str, Any], definition: dict[str, Any]) -> str:
    """A kind of value in a word or two."""
    kinds = [_resolved(part, definition) for part in told.get("anyOf", [told])]
    kinds = [kind for kind in kinds if kind.get("type") != "null"]
    if any("enum" in kind for kind in kinds):
        return ", ".join(f"`{value}`" for kind in kinds for value in kind.get("enum", []))
    types = [kind.get("type") for kind in kinds]
    if "ns|us" in str(kinds[0]) and types[0] != "object":
        return "a time"
    if types == ["string", "integer"] or [part.get("type") for part in kinds[0].get("anyOf", [])] == [
        "string",
        "integer",
    ]:
        return "bytes"
    return " or ".join(dict.fromkeys(_WORDS[str(kind)] for kind in types if str(kind) in _WORDS))


def _resolved(told: dict[str, Any], definition: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in told:
        found: dict[str, Any] = definition["$defs"][told["$ref"].rpartition("/")[2]]
        return found
    return told


_WORDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "`true`, `false`",
    "array": "a list",
    "object": "fields, below",
}


def errors() -> str:
    """Every error, what it is a kind of, what it says, and the exit code it ends a command with."""
    from narrowboat import errors as module

    rows = ["| error | is a | exit code | when |", "| --- | --- | --- | --- |"]
    for name, kind in vars(module).items():
        if not (inspect.isclass(kind) and issubclass(kind, module.NarrowboatError)):
            continue
        parents = ", ".join(f"`{base.__name__}`" for base in kind.__bases__)
        code = 2 if issubclass(kind, module.UsageError) else 1
        told = _cell(inspect.getdoc(kind) or "").split(" Attributes: ")[0].replace("``", "`")
        rows.append(f"| <a id='{name.lower()}'></a>`{name}` | {parents} | {code} | {told} |")
    return "\n".join(rows)


def stats() -> str:
    """The keys of a session's statistics, from the table in the docstring that the code itself refers to."""
    from narrowboat.stream.stats import collect

    rows = ["| key | unit | |", "| --- | --- | --- |"]
    rule = next(line for line in (inspect.getdoc(collect) or "").splitlines() if line.startswith("==="))
    first, second = (len(part) for part in rule.split()[:2])
    inside = False
    for line in (inspect.getdoc(collect) or "").splitlines():
        if line.startswith("==="):
            inside = True
        elif inside and line.strip() and not line.startswith("key "):
            key, unit, said = (
                line[:first].strip(),
                line[first : first + second + 1].strip(),
                line[first + second + 2 :],
            )
            rows.append(f"| `{key}` | {unit} | {_cell(said).replace('``', '`')} |")
    return "\n".join(rows)


MAKERS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "tasks-fields": tasks_fields,
    "errors": errors,
    "stats": stats,
}
