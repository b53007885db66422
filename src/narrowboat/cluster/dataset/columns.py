"""Columns of an Arrow table, value by value: tensors, lists, numbers; None stays None."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def values_of(table: Any, name: str) -> list[Any]:
    """The values of a column.

    Numbers and tensors come as NumPy has them, without a copy where there need be none; lists as arrays; None, also
    inside of a list, as None. The column is read without its gaps: with them, NumPy would make floats of integers.
    """
    from ray.data.block import BlockAccessor

    column = table.column(name)
    if column.null_count == len(column):
        return [None] * len(column)
    valid = column.is_valid()
    whole = table.select([name]) if column.null_count == 0 else table.select([name]).filter(valid)
    if _has_inner_gaps(whole.column(name)):
        found: Sequence[Any] = whole.column(name).to_pylist()
    else:
        found = list(BlockAccessor.for_block(whole).to_numpy(name))
    if column.null_count == 0:
        return list(found)
    rest = iter(found)
    return [next(rest) if there else None for there in valid.to_pylist()]


def _has_inner_gaps(column: Any) -> bool:
    """Whether a list of the column has a None in it."""
    import pyarrow as pa
    import pyarrow.compute as pc

    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.list_flatten(column)
        if column.null_count:
            return True
    return False


def with_columns(table: Any, made: dict[str, list[Any]]) -> Any:
    """A table with further columns.

    Args:
        table: as it is so far.
        made: by name, one value per row: an array, a number, a string; None for none.
    """
    import pyarrow as pa
    from ray.data.block import BlockAccessor

    for name, values in made.items():
        there = [value for value in values if value is not None]
        if not there:
            table = table.append_column(name, pa.nulls(len(values)))
            continue
        column = BlockAccessor.batch_to_arrow_block({name: _stack(there)}).column(name)
        if len(there) < len(values):
            column = _spread(column, values)
        table = table.append_column(name, column)
    return table


def _stack(values: list[Any]) -> Any:
    """As Ray Data takes it: one array where all have one shape, else an array of arrays."""
    arrays = [np.asarray(value) for value in values]
    if len({(array.shape, array.dtype) for array in arrays}) == 1:
        return np.stack(arrays)
    ragged = np.empty(len(arrays), dtype=object)
    for index, array in enumerate(arrays):
        ragged[index] = array
    return ragged


def _spread(column: Any, values: list[Any]) -> Any:
    """Put gaps where there is no value."""
    import pyarrow as pa

    places, seen = [], 0
    for value in values:
        places.append(None if value is None else seen)
        seen += value is not None
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    index = pa.array(places, pa.int64())
    if isinstance(whole, pa.ExtensionArray):
        return pa.ExtensionArray.from_storage(whole.type, whole.storage.take(index))
    return whole.take(index)
