"""Whether two outputs are the same bits, whatever structure they come in."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, nn.Module)


def output_tensors(output: Any) -> list[torch.Tensor]:
    """Every tensor in ``output``: in containers, dataclasses, and the attributes of other objects (caches)."""
    found: list[torch.Tensor] = []
    _collect(output, found, set())
    return found


def _collect(value: Any, found: list[torch.Tensor], seen: set[int]) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif not isinstance(leaf, _PLAIN) and id(leaf) not in seen:
            seen.add(id(leaf))
            if dataclasses.is_dataclass(leaf):
                _collect([getattr(leaf, field.name) for field in dataclasses.fields(leaf)], found, seen)
            elif hasattr(leaf, "__dict__"):
                _collect(list(vars(leaf).values()), found, seen)


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.cpu().view(torch.uint8).numpy().data


def output_digest(output: Any) -> str:
    """sha256 (hex) over the number, dtypes, shapes and bytes of the tensors in ``output``."""
    digest = hashlib.sha256()
    for tensor in output_tensors(output):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def first_difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """Where two lists of tensors differ, in words; empty if they are the same bits (NaN equals the same NaN)."""
    if len(ours) != len(theirs):
        return f"{len(ours)} output tensors instead of {len(theirs)}"
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.dtype != other.dtype or mine.shape != other.shape:
            return f"output {number} is {mine.dtype} {list(mine.shape)} instead of {other.dtype} {list(other.shape)}"
        if mine.numel() and _bytes(mine) != _bytes(other):
            unequal = int((mine != other).sum())
            apart = (mine.to(torch.complex128) - other.to(torch.complex128)).abs().max().item()
            return (
                f"{unequal:,} of {mine.numel():,} elements of output {number} differ, by {apart:.3g} at most"
                if unequal
                else f"output {number} differs in the sign of a zero"
            )
    return ""
