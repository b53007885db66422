"""Tensors between two processes, without pickle: their structure as JSON, their bytes in shared memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from narrowboat.errors import UsageError
from narrowboat.tasks.tensors import Signature, TensorSpec

_NAMES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def split(value: Any) -> tuple[Any, list[torch.Tensor]]:
    """Structure and tensors of what lies in lists, tuples and dictionaries, with plain values between.

    Raises:
        UsageError: it holds something else.
    """
    tensors: list[torch.Tensor] = []
    return _structure(value, tensors), tensors


def join(structure: Any, tensors: Sequence[Any]) -> Any:
    """What :func:`split` was given; dictionaries of any kind come back as plain ones."""
    ((kind, told),) = structure.items()
    if kind == "tensor":
        return tensors[told]
    if kind == "plain":
        return told
    if kind == "dict":
        return {key: join(item, tensors) for key, item in told}
    return {"list": list, "tuple": tuple}[kind](join(item, tensors) for item in told)


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """Of a tensor."""
    return TensorSpec(name, _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")), tuple(tensor.shape))


def over(memory: memoryview, offset: int, spec: TensorSpec) -> torch.Tensor:
    """A tensor whose elements lie in ``memory`` from ``offset`` on; nothing is copied."""
    dtype = _DTYPES.get(spec.datatype) or getattr(torch, spec.datatype)
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(memory[offset : offset + spec.nbytes], dtype=dtype).view(spec.shape)


def lay_down(tensor: torch.Tensor, memory: memoryview, offset: int, spec: TensorSpec) -> None:
    """Write a tensor's elements into ``memory`` from ``offset`` on."""
    if spec.nbytes:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        memory[offset : offset + spec.nbytes] = plain.reshape(-1).view(torch.uint8).numpy().data


def signature_of(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Signature:
    """What a network takes and gives, by one pass.

    Inputs have the names of the forward's parameters, outputs those of their keys or places.

    Args:
        module: the network.
        inputs: positional arguments of the pass.
        output: of the pass.

    Raises:
        UsageError: inputs or output hold something that cannot be sent.
    """
    takes, tensors = split(list(inputs))
    gives, results = split(output)
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    names = [
        f"{_parameter(parameters, place)}{rest}"
        for place, item in enumerate(takes["list"])
        for rest in _paths(item, ".")
    ]
    taken = tuple(spec_of(name, tensor) for name, tensor in zip(names, tensors, strict=True))
    paths = [path.removeprefix("_") for path in _paths(gives, "_")]
    given = (f"output_{path}" if path.isdigit() else path or "output" for path in paths)
    return Signature(taken, tuple(map(spec_of, given, results)), takes, gives)


def shapes(structure: Any, specs: Sequence[TensorSpec]) -> str:
    """What is of one kind with this: its structure, with the sizes and types of its tensors."""
    ((kind, told),) = structure.items()
    if kind == "tensor":
        return f"{specs[told].shape} {_torch_name(specs[told].datatype)}"
    if kind == "dict":
        return "{" + ", ".join(f"{key}: {shapes(item, specs)}" for key, item in told) + "}"
    if kind in ("list", "tuple"):
        return "[" + ", ".join(shapes(item, specs) for item in told) + "]"
    return type(told).__name__


def _torch_name(datatype: str) -> str:
    return str(_DTYPES[datatype]).removeprefix("torch.") if datatype in _DTYPES else datatype


def _parameter(parameters: Sequence[str], place: int) -> str:
    return parameters[place] if place < len(parameters) else f"input_{place}"


def _paths(structure: Any, between: str) -> list[str]:
    """Where each tensor lies, in order: keys and places with ``between`` before each."""
    ((kind, told),) = structure.items()
    if kind == "tensor":
        return [""]
    if kind == "plain":
        return []
    items = told if kind == "dict" else list(enumerate(told))
    return [f"{between}{key}{rest}" for key, item in items for rest in _paths(item, between)]


def _structure(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"plain": value}
    if isinstance(value, Mapping):
        return {"dict": [[str(key), _structure(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = type(value).__name__ if type(value) in (list, tuple) else "tuple"
        return {kind: [_structure(item, tensors) for item in value]}
    raise UsageError(f"a {type(value).__name__} cannot be sent; use tensors, numbers, strings, lists and dictionaries")
