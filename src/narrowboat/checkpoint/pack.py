"""Write weights in execution order at page-aligned offsets, as a file every safetensors reader opens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from narrowboat.checkpoint.atomic_file import atomic_file
from narrowboat.checkpoint.digest import content_digest
from narrowboat.checkpoint.entry import TensorEntry
from narrowboat.checkpoint.files import drop_cache, storage_error, write_all
from narrowboat.checkpoint.index import TORCH_SUFFIXES, open_index
from narrowboat.checkpoint.packed_format import PAGE, PackedMetadata, page_up, render_header, tensor_offsets
from narrowboat.checkpoint.safetensors_file import MAX_HEADER
from narrowboat.checkpoint.source import Source, check_names, file_source, memory_source
from narrowboat.errors import DigestError, StorageError, UsageError, WeightsFormatError, WeightsMismatchError
from narrowboat.quantities import format_bytes

_SYNC_EVERY = 64 * 2**20
_NO_DIGEST = "0" * 64


@dataclass(frozen=True, slots=True)
class PackReport:
    """What ``pack`` wrote.

    Attributes:
        path: the packed file.
        tensors: how many tensors it stores.
        aliases: how many further names share their bytes.
        total_bytes: bytes of the tensors.
        file_bytes: bytes of the file, header and padding included.
        digest: digest of the weights; the ``digest`` of the file's index.
    """

    path: Path
    tensors: int
    aliases: int
    total_bytes: int
    file_bytes: int
    digest: str

    @property
    def overhead_bytes(self) -> int:
        """Bytes of header and padding."""
        return self.file_bytes - self.total_bytes


def pack(
    source: str | Path | Mapping[str, torch.Tensor],
    dest: str | Path,
    *,
    order: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> PackReport:
    """Write ``source`` to ``dest`` as page-aligned safetensors with content digests.

    The model is never held: bytes pass through a buffer of 8 MiB, and the page cache of both files is
    dropped behind. The file appears under its name only when it is whole and on the disk.

    Args:
        source: anything :func:`open_index` opens, or a state dict.
        dest: the file to write, usually ``*.safetensors``; may be the source if ``overwrite``.
        order: tensor names in the order in which they are needed; those left out follow in the order of
            the source, and a tied name stands for the tensor it shares.
        progress: called with bytes done and bytes in all.
        overwrite: replace ``dest`` if it exists.

    Raises:
        UsageError: ``dest`` exists, is a folder, or has the suffix of a PyTorch file.
        WeightsMismatchError: ``order`` names tensors the source does not have.
        WeightsNotFoundError, WeightsFormatError: the source cannot be opened or packed.
        WeightsChangedError: the source changed while it was packed.
        DigestError: the source is packed itself, and a tensor's bytes are not those it was packed with.
        StorageError: disk full, or the storage failed; nothing is left behind.
    """
    dest = Path(dest).expanduser()
    if dest.suffix.lower() in TORCH_SUFFIXES:
        raise UsageError(
            f"{dest} is the name of a PyTorch file, pack writes safetensors; call it {dest.stem}.safetensors"
        )
    if not isinstance(source, (Mapping, str, os.PathLike)):
        raise UsageError(
            f"cannot pack a {type(source).__name__}: give a weights file, a folder, or model.state_dict()"
        )
    opened_source = memory_source(source) if isinstance(source, Mapping) else file_source(open_index(source))
    with opened_source as tensors:
        check_names([*tensors.entries, *tensors.aliases])
        entries = _in_order(tensors, order)
        with atomic_file(dest, overwrite=overwrite) as (descriptor, temporary):
            report = _write(tensors, entries, dest, descriptor, temporary, progress)
            tensors.check_unchanged()
    return report


def _in_order(source: Source, order: Sequence[str] | None) -> list[TensorEntry]:
    """The entries of ``source``: those that ``order`` names, then the rest."""
    if isinstance(order, str):
        raise UsageError(f"order must be a list of tensor names, not the text {order!r}")
    wanted = [source.aliases.get(name, name) for name in order or ()]
    unknown = [name for name in wanted if name not in source.entries]
    if unknown:
        listed = ", ".join(repr(name) for name in unknown[:5])
        raise WeightsMismatchError(f"the order names {len(unknown)} tensors that the source does not have: {listed}")
    return [source.entries[name] for name in dict.fromkeys([*wanted, *source.entries])]


def _write(
    source: Source,
    entries: list[TensorEntry],
    dest: Path,
    descriptor: int,
    temporary: Path,
    progress: Callable[[int, int], None] | None,
) -> PackReport:
    order = tuple(entry.name for entry in entries)
    draft = PackedMetadata(order, dict.fromkeys(order, _NO_DIGEST), source.aliases, _NO_DIGEST)
    start = len(render_header(entries, draft))
    if start > MAX_HEADER:
        raise WeightsFormatError(
            f"{len(entries)} tensors need a header of {start} bytes; at most {MAX_HEADER} are allowed"
        )
    offsets = tensor_offsets(entries, start)
    _check_space(dest, descriptor, offsets[-1])
    total, done, synced = sum(entry.nbytes for entry in entries), 0, start
    digests: dict[str, str] = {}
    for entry, offset in zip(entries, offsets[:-1], strict=True):
        content, position = hashlib.sha256(), offset
        for chunk in source.chunks(entry.name):
            content.update(chunk)
            write_all(descriptor, temporary, chunk, position)
            position += len(chunk)
            done += len(chunk)
            if position - synced >= _SYNC_EVERY:
                synced = _sync(descriptor, temporary, synced, position)
            if progress is not None:
                progress(done, total)
        write_all(descriptor, temporary, bytes(page_up(position) - position), position)
        digests[entry.name] = content.hexdigest()
        if source.digests.get(entry.name, digests[entry.name]) != digests[entry.name]:
            raise DigestError(f"{entry.file}: tensor {entry.name!r} is not what was packed; pack it from the original")
    digest = content_digest(entries, digests, source.aliases)
    header = render_header(entries, PackedMetadata(order, digests, source.aliases, digest))
    write_all(descriptor, temporary, header, 0)
    _sync(descriptor, temporary, 0, offsets[-1])
    return PackReport(dest, len(entries), len(source.aliases), total, offsets[-1], digest)


def _check_space(dest: Path, descriptor: int, need: int) -> None:
    """Refuse before the first byte what cannot fit, rather than after the last gigabyte."""
    try:
        space = os.fstatvfs(descriptor)
    except OSError:
        return
    free = space.f_bavail * space.f_frsize
    if space.f_blocks > 0 and free < need:
        raise StorageError(
            f"writing {dest}: no space: it needs {format_bytes(need)}, {format_bytes(free)} are free; "
            f"free some or write to another disk"
        )


def _sync(descriptor: int, path: Path, begin: int, end: int) -> int:
    """Put what was written onto the disk and out of the page cache; return the end of it, down to a page."""
    try:
        os.fdatasync(descriptor)
    except OSError as error:
        raise storage_error(error, f"writing {path}") from error
    end -= end % PAGE
    drop_cache(descriptor, begin, end - begin)
    return end
