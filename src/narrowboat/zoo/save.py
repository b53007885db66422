"""Write a zoo architecture with random weights, one tensor at a time.

Every tensor depends only on the seed and its own name, so files are the same wherever and in whatever order they
are made, up to torch's random generator.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from narrowboat.checkpoint.atomic_file import atomic_file
from narrowboat.checkpoint.dtypes import SAFETENSORS_CODES
from narrowboat.checkpoint.files import write_all
from narrowboat.zoo import get


def save_random_weights(
    name: str,
    path: str | Path,
    seed: int = 0,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write random weights for the zoo model ``name`` to ``path``, plain safetensors; return the file's bytes.

    Args:
        name: a zoo name, e.g. ``"resnet101"``.
        path: the file to write; it appears whole or not at all.
        seed: another seed gives other weights.
        overwrite: replace a file that is there.
        progress: called with (bytes written, bytes in all).

    Raises:
        UsageError: no such zoo model; or ``path`` exists and ``overwrite`` is off, or has no folder to be in.
        ModelError: a package that the model needs is not installed.
        StorageError: the disk is full, or failed.
    """
    path = Path(path)
    with torch.device("meta"):
        tensors = get(name)().state_dict()
    header = _header(tensors)
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    with atomic_file(path, overwrite=overwrite) as (descriptor, temporary):
        write_all(descriptor, temporary, header, 0)
        for key, tensor in tensors.items():
            values = random_tensor(key, tensor, seed).reshape(-1).view(torch.uint8)
            write_all(descriptor, temporary, memoryview(values.numpy().data), len(header) + done)
            done += tensor.nbytes
            if progress is not None:
                progress(done, total)
    return len(header) + total


def random_tensor(name: str, like: torch.Tensor, seed: int) -> torch.Tensor:
    """Random values of ``like``'s shape and dtype, at a scale that keeps activations finite through deep networks.

    Kernels are normal with variance 2 / fan-in for convolutions (He et al., arXiv:1502.01852) and 1 / fan-in for
    matrices and tables. Norm scales lie below one, so that a hundred residual branches add up to little.
    """
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    values = torch.empty(like.shape, dtype=torch.float32)
    if name.endswith("running_mean"):
        values.normal_(0.0, 0.1, generator=generator)
    elif name.endswith("running_var"):
        values.uniform_(0.8, 1.2, generator=generator)
    elif like.ndim < 2:
        if name.endswith("weight"):
            values.uniform_(0.5, 1.0, generator=generator)
        else:
            values.normal_(0.0, 0.05, generator=generator)
    elif like.ndim == 4:
        values.normal_(0.0, math.sqrt(2.0 / (like.shape[1] * like.shape[2] * like.shape[3])), generator=generator)
    else:
        values.normal_(0.0, math.sqrt(1.0 / like.shape[-1]), generator=generator)
    return values.to(like.dtype)


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    """The safetensors header: its length in 8 bytes, then JSON padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": SAFETENSORS_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
