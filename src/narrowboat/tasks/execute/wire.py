"""Tensors between two processes, without pickle: the structure as JSON, the bytes as safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from narrowboat.errors import UsageError


def to_wire(value: Any) -> tuple[Any, bytes]:
    """Structure and bytes of tensors in lists, tuples and dictionaries, with plain values between.

    Raises:
        UsageError: it holds something else.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _shape(value, tensors)
    return structure, save(tensors) if tensors else b""


def from_wire(structure: Any, payload: bytes) -> Any:
    """What :func:`to_wire` was given; dictionaries of any kind come back as plain ones.

    Raises:
        UsageError: the two do not belong together.
    """
    try:
        return _value(structure, load(payload) if payload else {})
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"no tensors were sent: {error!r}") from error


def shapes(value: Any) -> str:
    """What is of one kind with ``value``: its structure, with the sizes and types of its tensors."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shapes(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(shapes, value)) + "]"
    return type(value).__name__


def _shape(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu").contiguous().clone()
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    if isinstance(value, Mapping):
        return {"dict": [[str(key), _shape(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "tuple": [_shape(v, tensors) for v in value]}
    raise UsageError(f"a {type(value).__name__} cannot be sent; use tensors, numbers, strings, lists and dictionaries")


def _value(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, told),) = structure.items()
    if kind == "tensor":
        return tensors[told]
    if kind == "plain":
        return told
    if kind == "dict":
        return {key: _value(item, tensors) for key, item in told}
    return {"list": list, "tuple": tuple}[kind](_value(item, tensors) for item in told)
