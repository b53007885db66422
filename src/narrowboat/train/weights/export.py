"""The weights of a model as a plain safetensors file, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import nn

from narrowboat.arena.standin import is_standin, slot_of
from narrowboat.checkpoint.atomic_file import atomic_file
from narrowboat.checkpoint.dtypes import SAFETENSORS_CODES
from narrowboat.checkpoint.files import drop_cache, write_all
from narrowboat.checkpoint.source import tensor_chunks
from narrowboat.errors import UsageError
from narrowboat.profile.skeleton import tensor_names

_ALIGNMENT = 8  # bytes; where the format has data begin


def save_weights(model: nn.Module, path: Path, *, overwrite: bool = False) -> None:
    """Write all parameters and persistent buffers, wherever they are; the file appears whole or not at all.

    What is tied is written once, under its first name, as ``safetensors.torch.save_model`` does.

    Raises:
        UsageError: ``path`` exists, or is a folder; or a tensor is on meta.
        StorageError: disk full, or the storage failed; nothing is left behind.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[object] = set()
    for tensor, names, _ in tensor_names(model).values():
        if tensor.is_meta:
            raise UsageError(f"{names[0]!r} has no bytes to save: it is on meta")
        if is_standin(tensor):
            weight = slot_of(tensor).weight
            if weight in seen:
                continue
            seen.add(weight)
        tensors[names[0]] = tensor
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        nbytes = math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + nbytes],
        }
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-(8 + len(text)) // _ALIGNMENT) * _ALIGNMENT - 8)
    with atomic_file(path, overwrite=overwrite) as (descriptor, temporary):
        write_all(descriptor, temporary, len(text).to_bytes(8, "little") + text, 0)
        at = 8 + len(text)
        for tensor in tensors.values():
            at = _write(descriptor, temporary, tensor, at)
        drop_cache(descriptor)


def _write(descriptor: int, path: Path, tensor: torch.Tensor, at: int) -> int:
    if is_standin(tensor):
        slot = slot_of(tensor)
        with slot.weight.owner.touching([slot.weight]) as tensor_of:
            return _write(descriptor, path, tensor_of(slot), at)
    for chunk in tensor_chunks(tensor):
        write_all(descriptor, path, chunk, at)
        at += len(chunk)
    return at
