"""What a model returned, as columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from narrowboat.errors import UsageError


def name_outputs(returned: Any, output: str | tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The tensors of what a model returned, by the columns they go to.

    Args:
        returned: a tensor; a tuple of tensors; or a dict, None among its values left out.
        output: of one tensor, the column. Of a tuple, a name for each. Of a dict, the keys that are taken, which are
            the columns too; a single string is put before the keys, as in ``output_logits``, and numbers a tuple's.

    Raises:
        UsageError: it is none of these, or the names do not go with it.
    """
    named = returned if isinstance(returned, Mapping) else None
    if isinstance(returned, torch.Tensor):
        if not isinstance(output, str) and len(output) != 1:
            raise UsageError(f"the model returns one tensor, and output names {len(output)}: {', '.join(output)}")
        return {output if isinstance(output, str) else output[0]: returned}
    if named is None and not isinstance(returned, (tuple, list)):
        raise UsageError(f"the model returns {type(returned).__name__}: give finish= to make columns of it")
    if named is None:
        if isinstance(output, str):
            found = {f"{output}_{number}": value for number, value in enumerate(returned) if value is not None}
        elif len(output) != len(returned):
            raise UsageError(f"the model returns {len(returned)} values, and output names {len(output)}")
        else:
            found = dict(zip(output, returned, strict=True))
    elif isinstance(output, str):
        found = {f"{output}_{key}": value for key, value in named.items() if value is not None}
    else:
        unknown = [key for key in output if key not in named]
        if unknown:
            raise UsageError(f"the model returns no {unknown[0]!r}, but {', '.join(map(str, named))}")
        found = {key: named[key] for key in output}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"the model's {name!r} is {type(value).__name__} and no tensor: name those wanted in output=, "
                "or give finish="
            )
    return found


def as_value(tensor: Any, name: str) -> Any:
    """One row's output as a column's value: a leading dimension of 1 taken off, so that a row is a row again.

    Raises:
        UsageError: NumPy, and so Arrow, has no such numbers.
    """
    if not isinstance(tensor, torch.Tensor):
        return tensor
    row = tensor[0] if tensor.ndim and tensor.shape[0] == 1 else tensor
    try:
        return row.detach().numpy()
    except TypeError:
        raise UsageError(
            f"the model's {name!r} is {str(row.dtype).removeprefix('torch.')}, which no column can hold: convert it "
            "in finish="
        ) from None


def columns_of(outputs: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    """By column, a value for each row; None where a row has none.

    Raises:
        UsageError: rows have different columns.
    """
    names: dict[str, None] = {}
    for row in outputs:
        names.update(dict.fromkeys(row or ()))
    for row in outputs:
        if row is not None and len(row) != len(names):
            raise UsageError(f"a row has no {next(name for name in names if name not in row)!r}, and others have it")
    return {
        name: [
            None if row is None else as_value(np.asarray(row[name]) if _plain(row[name]) else row[name], name)
            for row in outputs
        ]
        for name in names
    }


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool)) and not isinstance(value, np.generic)
