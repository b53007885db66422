"""Rows of a data set as inputs of a model, and its outputs as columns. No Ray but for its column types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from narrowboat.cluster.dataset.columns import values_of
from narrowboat.errors import RowError, UsageError

MISSING = ("raise", "null")


@dataclass(frozen=True)
class Rows:
    """How a row becomes the arguments of a call.

    Attributes:
        feeds: by argument (its number, or its name): the column. Empty where ``prepare`` takes whole rows.
        example: the arguments of one pass.
        prepare: the caller's own, from a row (a dict of columns) to the arguments of one call.
        columns: those that ``prepare`` is given.
        keep: columns that are carried over; None: all but those that feed the model.
        missing: what becomes of a row in which an input is None: "raise", or "null" for outputs of None.
        output: how outputs are called (``outputs.name_outputs``).
        finish: the caller's own, from what the model returned to a dict of columns.
    """

    feeds: tuple[tuple[int | str, str], ...]
    example: tuple[Any, ...] | Mapping[str, Any]
    prepare: Callable[[dict[str, Any]], Any] | None = None
    columns: tuple[str, ...] | None = None
    keep: tuple[str, ...] | None = None
    missing: str = "raise"
    output: str | tuple[str, ...] = "output"
    finish: Callable[[Any], Mapping[str, Any]] | None = None

    def used(self, table: Any) -> list[str]:
        """The columns that are looked at. Raises UsageError: one is not there."""
        if self.prepare is not None:
            used = list(self.columns) if self.columns is not None else list(table.column_names)
        else:
            used = [column for _, column in self.feeds]
        unknown = [name for name in [*used, *(self.keep or ())] if name not in table.column_names]
        if unknown:
            raise UsageError(f"the data set has no column {unknown[0]!r}; it has {', '.join(table.column_names)}")
        return used

    def carried(self, table: Any) -> Any:
        """The part of a table that goes on as it is."""
        if self.keep is not None:
            return table.select(list(self.keep))
        fed = {column for _, column in self.feeds} | set(self.columns or ())
        return table.select([name for name in table.column_names if name not in fed])

    def inputs(self, table: Any) -> list[Any]:
        """The arguments of each row: a tuple, a dict or a tensor, as ``Session.map`` takes them; None: missing.

        Raises:
            RowError: a row cannot be used.
            UsageError: a column is not there.
        """
        used = self.used(table)
        columns = {name: values_of(table, name) for name in used}
        made: list[Any] = []
        for index in range(table.num_rows):
            row = {name: values[index] for name, values in columns.items()}
            gaps = [name for name in used if row[name] is None]
            if gaps and (self.prepare is None or self.columns is not None):
                if self.missing == "raise":
                    self._refuse(table, index, gaps[0], "it is None; missing='null' gives such rows an output of None")
                made.append(None)
            elif self.prepare is not None:
                made.append(self._prepared(table, index, row))
            else:
                made.append(self._fed(table, index, row))
        return made

    def _prepared(self, table: Any, index: int, row: dict[str, Any]) -> Any:
        assert self.prepare is not None
        try:
            made = self.prepare(row)
        except Exception as error:
            raise RowError(
                f"{describe(table, index)}: prepare failed: {type(error).__name__}: {error}", index=index
            ) from error
        if not isinstance(made, (torch.Tensor, tuple, Mapping)):
            raise RowError(
                f"{describe(table, index)}: prepare has to return a tensor, a tuple of positional arguments or a "
                f"dict of keyword arguments, and returned {type(made).__name__}",
                index=index,
            )
        return made

    def _fed(self, table: Any, index: int, row: dict[str, Any]) -> Any:
        arguments = arguments_of(self.example)
        for argument, column in self.feeds:
            try:
                arguments[argument] = as_input(row[column], arguments[argument])
            except (UsageError, ValueError, TypeError) as error:
                self._refuse(table, index, column, str(error))
        if isinstance(self.example, Mapping):
            return {str(argument): value for argument, value in arguments.items()}
        return tuple(arguments[number] for number in range(len(self.example)))

    def _refuse(self, table: Any, index: int, column: str, why: str) -> None:
        raise RowError(f"{describe(table, index)}, column {column!r}: {why}", index=index)


def arguments_of(example: tuple[Any, ...] | Mapping[str, Any]) -> dict[int | str, Any]:
    """The arguments of one pass by number, or by name."""
    arguments: dict[int | str, Any] = {}
    arguments.update(example.items() if isinstance(example, Mapping) else enumerate(example))
    return arguments


def as_input(value: Any, example: torch.Tensor) -> torch.Tensor:
    """One value of a column as an argument like the example's.

    A value with one dimension fewer gets a leading one of size 1. Integers become the example's integers and floats
    its floats; from one to the other is the caller's to say, since pixels are seldom meant as they are.

    Raises:
        UsageError: it is no array of numbers, or of another kind.
    """
    array = np.asarray(value)
    if array.dtype == object:
        array = np.array(value.tolist() if isinstance(value, np.ndarray) else value)
    if array.dtype.kind not in "biuf":
        raise UsageError(f"it holds {type(value).__name__}, and the model takes numbers: give prepare=")
    found = torch.from_numpy(np.array(array, copy=True, order="C"))
    if found.is_floating_point() != example.is_floating_point() or (found.dtype is torch.bool) != (
        example.dtype is torch.bool
    ):
        raise UsageError(
            f"it holds {str(found.dtype).removeprefix('torch.')}, and the model takes "
            f"{str(example.dtype).removeprefix('torch.')}: give prepare= to say how one becomes the other"
        )
    if found.ndim == example.ndim - 1:
        found = found.unsqueeze(0)
    return found.to(example.dtype)


def describe(table: Any, index: int) -> str:
    """A row by its place in the batch and by what its plain columns say."""
    import pyarrow as pa

    plain = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
            value = column[index].as_py()
            plain.append(f"{name}={(value[:80] if isinstance(value, str) else value)!r}")
    told = f" ({', '.join(plain[:3])})" if plain else ""
    return f"row {index} of a batch of {table.num_rows}{told}"


def feeds_of(
    columns: str | Sequence[str] | Mapping[str, str] | None,
    example: tuple[Any, ...] | Mapping[str, Any],
) -> tuple[tuple[int | str, str], ...]:
    """Which column feeds which argument.

    Args:
        columns: one column for the first argument; several for as many positional ones; or a dict from the name of a
            keyword argument to its column.
        example: the arguments of one pass.

    Raises:
        UsageError: the two do not go together.
    """
    if columns is None:
        raise UsageError("columns= is missing: say which column feeds the model, or give prepare=")
    feeds: list[tuple[int | str, str]]
    if isinstance(columns, Mapping):
        feeds = [(str(argument), str(column)) for argument, column in columns.items()]
    elif isinstance(example, Mapping):
        raise UsageError(
            "example is a dict of keyword arguments: columns has to be one too, from argument to column, "
            f"such as {{{next(iter(example), 'x')!r}: 'column'}}"
        )
    else:
        feeds = list(enumerate([columns] if isinstance(columns, str) else map(str, columns)))
    arguments = arguments_of(example)
    for argument, column in feeds:
        if not isinstance(arguments.get(argument), torch.Tensor):
            raise UsageError(f"column {column!r} is to feed argument {argument!r}, and example has no such tensor")
    fed = {argument for argument, _ in feeds}
    hungry = [argument for argument, value in arguments.items() if isinstance(value, torch.Tensor)]
    for argument in hungry:
        if argument not in fed:
            raise UsageError(f"no column feeds argument {argument!r} of the example: name one in columns=")
    return tuple(feeds)
