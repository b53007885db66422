"""Where a task's inputs come from, one per job."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from narrowboat.errors import ModelError, TaskSpecError, UsageError
from narrowboat.tasks.execute.input_files import input_files
from narrowboat.tasks.spec.schema import InputSpec
from narrowboat.zoo.resolve import ResolvedModel


class InputsEndedError(Exception):
    """No more inputs will come."""


class Source:
    """Inputs of one task.

    Args:
        ready: gives the next input at once; None if there is none now.

    Raises (from :meth:`take`):
        InputsEndedError: none will come any more.
    """

    def __init__(self, ready: Callable[[], tuple[Any, ...] | None]) -> None:
        self.take = ready


def source_of(spec: InputSpec | None, resolved: ResolvedModel, example: tuple[Any, ...], folder: Path) -> Source:
    """The source that a task asks for; a queue's gives nothing by itself.

    Raises:
        TaskSpecError: the file, folder or generator cannot be used.
    """
    if spec is None or spec.generator == "example":
        return Source(lambda: example)
    if spec.file is not None:
        inputs = _read(resolved, folder / spec.file)
        return Source(lambda: inputs)
    if spec.folder is not None:
        return _cycle([_read(resolved, path) for path in input_files(folder / spec.folder)])
    if spec.queue is not None:
        return Source(lambda: None)
    assert spec.generator is not None
    return _generated(spec.generator)


def _read(resolved: ResolvedModel, path: Path) -> tuple[Any, ...]:
    try:
        found = resolved.inputs(path)
    except UsageError as error:
        raise TaskSpecError(str(error)) from error
    assert found is not None
    return found


def _cycle(inputs: list[tuple[Any, ...]]) -> Source:
    around = itertools.cycle(inputs)
    return Source(lambda: next(around))


def _generated(name: str) -> Source:
    """The values of a generator, taken as they are released; it must have them ready."""
    module_name, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), attribute)()
        values: Iterator[Any] = iter(made)
    except Exception as error:
        raise TaskSpecError(f"generator {name!r} cannot be used: {type(error).__name__}: {error}") from error

    def take() -> tuple[Any, ...]:
        try:
            value = next(values)
        except StopIteration as error:
            raise InputsEndedError from error
        except Exception as error:
            raise ModelError(f"generator {name!r} failed: {type(error).__name__}: {error}") from error
        return value if isinstance(value, tuple) else (value,)

    return Source(take)
