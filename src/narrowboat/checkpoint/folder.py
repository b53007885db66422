"""Which files hold the weights: Hugging Face folders and the index JSON of sharded weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from narrowboat.checkpoint.entry import FileTensors
from narrowboat.checkpoint.files import opened, read_exactly, storage_error
from narrowboat.errors import WeightsFormatError, WeightsNotFoundError

# In the order in which transformers' and diffusers' from_pretrained look for them.
_FOLDER_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_MAX_INDEX = 100_000_000


def weights_in_folder(folder: Path) -> Path:
    """The weights file, or the index JSON of the shards, in a model folder.

    Raises:
        WeightsNotFoundError: none of the usual names, and not exactly one ``*.safetensors``.
        StorageError: the folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise storage_error(error, f"reading the folder {folder}") from error
    for name in _FOLDER_NAMES:
        if name in names:
            return folder / name
    safetensors = [name for name in names if name.endswith(".safetensors")]
    if len(safetensors) == 1:
        return folder / safetensors[0]
    if safetensors:
        raise WeightsNotFoundError(
            f"{folder} holds {len(safetensors)} safetensors files and no index of them; give one"
        )
    raise WeightsNotFoundError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json, pytorch_model.bin "
        f"or pytorch_model.bin.index.json"
    )


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name to shard name, from the index JSON ``path``.

    Raises:
        WeightsNotFoundError: no such file, or no permission.
        WeightsFormatError: not an index, or a shard that is not a file name beside it.
        StorageError: the read failed.
    """
    with opened(path) as (descriptor, status):
        if status.st_size > _MAX_INDEX:
            raise WeightsFormatError(f"{path} is too large for an index of shards: {status.st_size} bytes")
        raw = read_exactly(descriptor, path, 0, status.st_size)
    try:
        index: Any = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsFormatError(f"{path} is not valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsFormatError(f"{path} is not an index of sharded weights: it has no weight_map")
    for name, shard in weight_map.items():
        # An index is somebody else's text: it may name files beside it, and no others.
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\0" in shard:
            raise WeightsFormatError(f"{path}: the shard {shard!r} of tensor {name!r} is not a file name")
    return weight_map


def check_shards(path: Path, weight_map: dict[str, str], shards: dict[str, FileTensors]) -> None:
    """Check that the index ``path`` and its shards agree on which tensor is where.

    Raises:
        WeightsFormatError: a tensor is missing from its shard, listed for another, or not listed.
    """
    for name, shard in weight_map.items():
        held = shards[shard]
        if name not in held.entries and name not in held.aliases:
            elsewhere = [s for s, t in shards.items() if name in t.entries or name in t.aliases]
            hint = f"it is in {elsewhere[0]}" if elsewhere else "no shard holds it"
            raise WeightsFormatError(f"{path} says that tensor {name!r} is in {shard}, but {hint}")
    for shard, held in shards.items():
        for name in (*held.entries, *held.aliases):
            if name not in weight_map:
                raise WeightsFormatError(f"{path} does not list tensor {name!r}, which {shard} holds")
            if weight_map[name] != shard:
                raise WeightsFormatError(f"{path}: both {weight_map[name]} and {shard} hold tensor {name!r}")
