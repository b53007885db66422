"""Read ``tasks.yaml``; say which line is wrong, which field, and what is allowed there."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from narrowboat.errors import TaskSpecError
from narrowboat.tasks.spec.schema import BlockSpec, Contract, InputSpec, StorageSpec, SupplySpec, TaskSpec, TasksSpec

_MOST_BYTES = 4 << 20
_PARTS: dict[str, type[BaseModel]] = {
    "tasks": TaskSpec,
    "blocks": BlockSpec,
    "contract": Contract,
    "input": InputSpec,
    "supply": SupplySpec,
    "storage": StorageSpec,
}
# What pydantic says in Python's words.
_KINDS = {
    "too_short": "must have at least one entry",
    "tuple_type": "must be a list",
    "model_type": "must be fields with values",
    "model_attributes_type": "must be fields with values",
    "dict_type": "must be fields with values",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
}
Place = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """Plain YAML, with keys that come twice refused: the second would silently win."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (str, int, float, bool)) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        seen.add(key if isinstance(key, (str, int, float, bool)) else None)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load_tasks(path: str | Path) -> TasksSpec:
    """The tasks that a file describes.

    Raises:
        TaskSpecError: it cannot be read, is no YAML, or says something that is not allowed.
    """
    where = Path(path)
    try:
        with where.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise TaskSpecError(f"cannot read {where}: {error.strerror}") from error
    if len(data) > _MOST_BYTES:
        raise TaskSpecError(f"{where} is larger than 4 MiB: that is no description of tasks")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TaskSpecError(f"{where} is not UTF-8 text: {error}") from error
    return parse_tasks(text, str(where))


def parse_tasks(text: str, where: str = "tasks.yaml") -> TasksSpec:
    """The same from text; ``where`` is its name in messages."""
    try:
        told = yaml.load(text, Loader=_Loader)
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"{where}:{mark.line + 1}: " if mark is not None else f"{where}: "
        raise TaskSpecError(f"{line}{error.problem or 'this is no YAML'}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise TaskSpecError(f"{where}: {' '.join(str(error).split())}") from error
    if not isinstance(told, Mapping):
        raise TaskSpecError(f"{where}:1: expected fields such as 'budget:' and 'tasks:', not {_kind(told)}")
    return tasks_from(told, where, tree)


def tasks_from(told: Mapping[str, Any], where: str = "tasks", tree: yaml.Node | None = None) -> TasksSpec:
    """The same from a dictionary.

    Raises:
        TaskSpecError: with every problem found, a line each.
    """
    try:
        return TasksSpec.model_validate(told)
    except ValidationError as error:
        found = error.errors()
        # Where every item of a list is wrong, the list counts as too short; the items' own problems say more.
        problems = [p for p in found if p["type"] != "too_short" or p["input"] in ((), [])] or found
        lines = [_message(dict(problem), told, where, tree) for problem in problems]
        raise TaskSpecError("\n".join(dict.fromkeys(lines))) from error


def _message(problem: Mapping[str, Any], told: Mapping[str, Any], where: str, tree: yaml.Node | None) -> str:
    place: Place = tuple(problem["loc"])
    line = _line(tree, place)
    start = f"{where}:{line}: " if line else f"{where}: "
    field = _spell(place, told)
    kind = problem["type"]
    if kind == "extra_forbidden":
        allowed = _allowed(place)
        near = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed here: {', '.join(allowed)}"
        return f"{start}{field}: unknown field; {hint}"
    if kind == "missing":
        return f"{start}{field}: missing; it must be given"
    if kind == "literal_error":
        return f"{start}{field}: {problem['input']!r} is not allowed; use {problem['ctx']['expected']}"
    if kind in _KINDS:
        return f"{start}{field}: {_KINDS[kind]}, not {problem['input']!r:.60}"
    said = str(problem["msg"]).removeprefix("Value error, ")
    if kind != "value_error":
        said = f"{said[:1].lower()}{said[1:]}, not {problem['input']!r:.60}"
    return f"{start}{field}: {said}" if field else f"{start}{said}"


def _spell(place: Place, told: Any) -> str:
    """``task 'camera': blocks[2].load``: with the task's name where it has one."""
    rest = list(place)
    lead = ""
    if len(rest) > 1 and rest[0] == "tasks" and isinstance(rest[1], int):
        tasks = told.get("tasks")
        task = tasks[rest[1]] if isinstance(tasks, Sequence) and len(tasks) > rest[1] else None
        name = task.get("name") if isinstance(task, Mapping) else None
        lead = f"task {name!r}" if isinstance(name, str) else f"tasks[{rest[1]}]"
        rest = rest[2:]
    spelled = ""
    for part in rest:
        spelled += f"[{part}]" if isinstance(part, int) else f".{part}" if spelled else str(part)
    return ": ".join(filter(None, (lead, spelled)))


def _allowed(place: Place) -> list[str]:
    """The fields there are where an unknown one was found."""
    owner = next((part for part in reversed(place[:-1]) if isinstance(part, str)), None)
    return sorted(_PARTS.get(owner or "", TasksSpec).model_fields)


def _line(node: yaml.Node | None, place: Place) -> int | None:
    """The line of the deepest part of ``place`` that is there."""
    line = None if node is None else node.start_mark.line + 1
    for part in place:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if getattr(key, "value", None) == str(part):
                    found, line = value, key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = node.value[part]
            line = found.start_mark.line + 1 if found is not None else line
        if found is None:
            break
        node = found
    return line


def _kind(value: Any) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"
