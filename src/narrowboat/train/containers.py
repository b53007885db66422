"""Lists, dicts, sets and plain objects that a model or a loss reaches, put back as they were.

Models keep histories (``self.seen.append(x)``), hooks collect activations in a list of their closure. A pass that only
measures must leave none of that behind. What can be reached is followed through attributes, elements, closures,
defaults and the globals that a function names; torch's, numpy's and narrowboat's own objects are not looked into.
"""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_MOST = 1_000_000  # elements; what a model reaches beyond is not looked after
_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.Tensor, type, types.ModuleType)
_NOT_OURS = frozenset(
    {"torch", "numpy", "narrowboat", "builtins", "weakref", "threading", "_thread", "logging", "io", "_io", "re"}
    | {
        "abc",
        "concurrent",
        "multiprocessing",
        "asyncio",
        "contextlib",
        "enum",
        "functools",
        "inspect",
        "typing",
        "random",
    }
)


class Containers:
    """The contents, by reference, of every mutable container that can be reached.

    Args:
        roots: where to begin: modules (their attributes), functions, anything.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self._lists: list[tuple[Any, list[Any]]] = []
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._left = _MOST
        self._seen: dict[int, Any] = {}  # with the objects, so that no address is used again meanwhile
        stack = list(roots)
        while stack and self._left > 0:
            self._visit(stack.pop(), stack)
        self._seen.clear()

    def restore(self) -> None:
        """Put back what they held; those that were not changed are not touched."""
        for container, content in self._lists:
            if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
                container.clear()
                container.extend(content)
        for table, entries in self._dicts:
            if not _same(table, entries):
                table.clear()
                table.update(entries)
        for group, members in self._sets:
            if group != members:
                group.clear()
                group.update(members)

    def _visit(self, value: Any, stack: list[Any]) -> None:
        if isinstance(value, _ATOMS) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._push(stack, value.__dict__.values())
        elif isinstance(value, (list, deque)):
            self._lists.append((value, list(value)))
            self._push(stack, value)
        elif isinstance(value, dict):
            self._dicts.append((value, dict(value)))
            self._push(stack, value.values())
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
            self._left -= len(value)
        elif isinstance(value, (tuple, frozenset)):
            self._push(stack, value)
        elif isinstance(value, types.FunctionType):
            self._push(stack, _reached_by(value))
        elif isinstance(value, types.MethodType):
            self._push(stack, (value.__self__, value.__func__))
        elif isinstance(value, functools.partial):
            self._push(stack, (value.func, value.args, value.keywords))
        elif not _foreign(type(value).__module__) and isinstance(getattr(value, "__dict__", None), dict):
            self._visit(value.__dict__, stack)

    def _push(self, stack: list[Any], values: Iterable[Any]) -> None:
        found = [value for value in values if not isinstance(value, _ATOMS)]
        self._left -= len(found) + 1
        stack.extend(found)


def _foreign(module: str | None) -> bool:
    return (module or "builtins").partition(".")[0] in _NOT_OURS


def _reached_by(function: types.FunctionType) -> list[Any]:
    if _foreign(function.__module__):
        return []
    reached: list[Any] = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        try:
            reached.append(cell.cell_contents)
        except ValueError:  # not bound yet
            continue
    names = (function.__globals__.get(name) for name in function.__code__.co_names)
    reached += [value for value in names if isinstance(value, (list, dict, set, deque))]
    return reached


def _same(table: dict[Any, Any], entries: dict[Any, Any]) -> bool:
    return len(table) == len(entries) and all(key in table and table[key] is value for key, value in entries.items())
