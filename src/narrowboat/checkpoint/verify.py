"""Check a packed file against the digests it carries."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from narrowboat.checkpoint.entry import TensorEntry
from narrowboat.checkpoint.files import CHUNK, drop_cache, opened, read_chunks
from narrowboat.checkpoint.index import open_index
from narrowboat.checkpoint.packed_format import page_up
from narrowboat.errors import DigestError, WeightsFormatError


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` read and found right.

    Attributes:
        files: the files read.
        tensors: how many tensors were checked.
        total_bytes: their bytes.
        digest: digest of the weights.
    """

    files: tuple[Path, ...]
    tensors: int
    total_bytes: int
    digest: str


def verify(path: str | Path, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read every tensor of a packed file and compare its digest.

    Args:
        path: a packed file, or a folder or index JSON of packed files.
        progress: called with bytes done and bytes in all.

    Raises:
        DigestError: bytes are not those that were packed; names each tensor and its file.
        WeightsFormatError: not packed (there are no digests), or the header is damaged.
        WeightsNotFoundError, WeightsChangedError, StorageError: as for :func:`open_index`.
    """
    index = open_index(path)
    if not index.packed:
        raise WeightsFormatError(f"{path} carries no digests to verify: it was not written by narrowboat pack")
    buffer, done, bad = bytearray(CHUNK), 0, []
    for file in index.files:
        with opened(file) as (descriptor, _):
            for entry in index.entries.values():
                if entry.file != file:
                    continue
                if not _is_intact(descriptor, entry, index.digests[entry.name], buffer):
                    bad.append(entry)
                done += entry.nbytes
                if progress is not None:
                    progress(done, index.total_bytes)
            drop_cache(descriptor)
    index.check_unchanged()
    if bad:
        listed = ", ".join(f"{entry.name!r} in {entry.file}" for entry in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DigestError(
            f"the bytes of tensor {listed}{more} are not those that were packed; pack again from the source"
        )
    return VerifyReport(index.files, len(index.entries), index.total_bytes, index.digest)


def _is_intact(descriptor: int, entry: TensorEntry, digest: str, buffer: bytearray) -> bool:
    """Whether the tensor has its digest and the padding behind it is zero."""
    content, left = hashlib.sha256(), entry.nbytes
    padding_is_zero = True
    for chunk in read_chunks(descriptor, entry.file, entry.offset, page_up(entry.nbytes), buffer):
        content.update(chunk[:left])
        padding_is_zero &= not any(chunk[left:])
        left = max(0, left - len(chunk))
    return padding_is_zero and content.hexdigest() == digest
