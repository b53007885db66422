"""Operators that need only some rows (slices of the first dimension) of a stack of matrices: routing to experts."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten
_GROUPED = tuple(
    op
    for op in (
        getattr(getattr(aten, "_grouped_mm", None), "default", None),  # how transformers runs its experts
        getattr(getattr(getattr(torch.ops, "transformers", None), "grouped_mm_fallback", None), "default", None),
    )
    if op is not None
)


def is_grouped(func: Any) -> bool:
    """Whether ``func`` multiplies groups of rows with the matrices of a stack, one each."""
    return func in _GROUPED or getattr(func, "_name", "") == "transformers::grouped_mm_fallback"


def turns(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether ``func`` exchanges the last two dimensions of the stack ``args[0]``."""
    return bool(func is aten.transpose.int and args[0].dim() == 3 and sorted(dim % 3 for dim in args[1:3]) == [1, 2])


def takes_rows(func: Any, args: tuple[Any, ...], stack: torch.Tensor) -> bool:
    """Whether ``func`` reads only rows of ``stack``, or makes a view of it that is of no use but for that.

    Args:
        func: an operator as the dispatcher sees it.
        args: its positional arguments.
        stack: one of them.
    """
    if stack.dim() < 2 or not args:
        return False
    if func in (aten.detach.default, aten.alias.default, torch.ops.prim.device.default):
        return True
    if func is aten.select.int:
        return args[0] is stack and args[1] in (0, -stack.dim())
    if func is aten.index.Tensor:
        return args[0] is stack and len(args[1]) == 1 and args[1][0].dtype in (torch.int64, torch.int32)
    if func is aten.index_select.default:
        return args[0] is stack and args[1] in (0, -stack.dim())
    if is_grouped(func):
        return len(args) > 2 and args[1] is stack and args[0].dim() == 2 and args[2] is not None
    return args[0] is stack and turns(func, args)
