"""Storages to spill, and their bytes."""

from __future__ import annotations

import torch


def made(nbytes: int, seed: int = 0) -> torch.UntypedStorage:
    """A storage of ``nbytes`` bytes that differ."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).untyped_storage()


def raw(storage: torch.UntypedStorage) -> bytes:
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
