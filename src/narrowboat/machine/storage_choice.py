"""How to read from a device: the chunk size and depth that ``doctor`` measured there, kept for later processes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

from narrowboat.machine.cache import cache_folder, write_durably
from narrowboat.machine.storage import StorageProbe

_LARGEST_CHUNK, _DEEPEST = 64 << 20, 16
_PAGE = 4096
_STAGING = 4 << 20  # bytes of all the buffers


@dataclass(frozen=True, slots=True)
class StorageChoice:
    """How to read from one device.

    Attributes:
        chunk: bytes per read call.
        depth: reads under way at once.
        bandwidth: bytes per second measured with them, processor busy; None if it was not.
    """

    chunk: int = 2 << 20
    depth: int = 2
    bandwidth: float | None = None

    @property
    def staging_bytes(self) -> int:
        """Bytes of the readers' aligned buffers, if every one of them is in use."""
        return self.depth * (self.chunk + 2 * _PAGE)

    def for_copies(self) -> StorageChoice:
        """The same with smaller chunks: each worker copies out of a buffer of its own, and the budget pays for it."""
        return replace(self, chunk=min(self.chunk, max(_STAGING // self.depth // _PAGE, 1) * _PAGE))


def _path(device: int) -> Path:
    return cache_folder() / f"storage-{device}.json"


def save_storage_choice(folder: str | Path, probe: StorageProbe) -> None:
    """Keep what a probe of ``folder`` found. Raises OSError if the cache folder cannot be written."""
    choice = {"chunk": probe.chunk, "depth": probe.depth, "bandwidth": probe.busy_bandwidth}
    write_durably(_path(os.stat(folder).st_dev), json.dumps(choice) + "\n")


def load_storage_choice(path: str | Path) -> StorageChoice:
    """The choice kept for the device that holds ``path``; the built-in one if there is none that makes sense."""
    try:
        kept = json.loads(_path(os.stat(path).st_dev).read_text(encoding="utf-8"))
        chunk, depth, bandwidth = int(kept["chunk"]), int(kept["depth"]), kept["bandwidth"]
    except (OSError, ValueError, KeyError, TypeError):
        return StorageChoice()
    if not 4096 <= chunk <= _LARGEST_CHUNK or chunk % 4096 or not 1 <= depth <= _DEEPEST:
        return StorageChoice()
    return StorageChoice(chunk, depth, float(bandwidth) if isinstance(bandwidth, (int, float)) else None)
