"""The index: every tensor of a model at rest, and the file and offset where its bytes lie."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from narrowboat.checkpoint.digest import content_digest, stamp_digest
from narrowboat.checkpoint.entry import FileStamp, FileTensors, TensorEntry
from narrowboat.checkpoint.files import opened, read_exactly
from narrowboat.checkpoint.folder import check_shards, read_weight_map, weights_in_folder
from narrowboat.checkpoint.safetensors_file import read_safetensors
from narrowboat.checkpoint.torch_file import ZIP_MAGIC, read_torch
from narrowboat.errors import WeightsChangedError, WeightsFormatError

TORCH_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt"}


@dataclass(frozen=True)
class WeightsIndex:
    """Where each tensor of a model lies; nothing of it is loaded.

    Attributes:
        entries: canonical names to entries, file by file; by offset in safetensors files, in the order
            of the state dict in ``.pth`` files.
        aliases: other names to the canonical name that shares its bytes (tied weights).
        files: the files that hold the tensors.
        packed: ``pack`` wrote every file, so that each tensor begins and ends on a page.
        digests: sha256 (hex) of each tensor's bytes by canonical name; empty unless packed.
        digest: identity of the weights: over the contents if packed, else over the headers and the
            size, modification time and inode of the files.
        stamps: what each file was when it was opened.
    """

    entries: dict[str, TensorEntry]
    aliases: dict[str, str]
    files: tuple[Path, ...]
    packed: bool
    digests: dict[str, str]
    digest: str
    stamps: tuple[FileStamp, ...] = field(repr=False)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, tied ones once, without padding."""
        return sum(entry.nbytes for entry in self.entries.values())

    def resolve(self, name: str) -> TensorEntry | None:
        """The entry of ``name``, through aliases; None if there is no such tensor."""
        return self.entries.get(self.aliases.get(name, name))

    def names(self) -> tuple[str, ...]:
        """All names a state dict would have: canonical ones, then aliases."""
        return (*self.entries, *self.aliases)

    def check_unchanged(self) -> None:
        """One ``stat`` per file: is it still what was opened?

        Raises:
            WeightsChangedError: a file is gone, was replaced, or has another size or modification time.
        """
        for path, stamp in zip(self.files, self.stamps, strict=True):
            try:
                now = FileStamp.of(os.stat(path))
            except OSError as error:
                raise WeightsChangedError(
                    f"{path} cannot be found any more: {error.strerror}; open it again"
                ) from error
            if now != stamp:
                what = "replaced" if (now.inode, now.device) != (stamp.inode, stamp.device) else "altered"
                raise WeightsChangedError(f"{path} was {what} after it was opened; open it again")

    def require_streamable(self) -> None:
        """Check that every tensor's bytes can be read as they are.

        Raises:
            WeightsFormatError: a tensor is not contiguous in its file.
        """
        for entry in self.entries.values():
            if not entry.contiguous:
                raise WeightsFormatError(
                    f"{entry.file}: tensor {entry.name!r} is not contiguous there, so it cannot be streamed; "
                    f"run: narrowboat pack {entry.file} -o model.safetensors"
                )


def open_index(path: str | Path) -> WeightsIndex:
    """Index the weights at ``path`` without loading them.

    Args:
        path: a safetensors file, the index JSON of sharded weights, a ``torch.save`` file (``.pth``,
            ``.pt``, ``.bin``, ``.ckpt``), or a Hugging Face folder.

    Raises:
        WeightsNotFoundError: no such file, no permission, or a folder without weights.
        WeightsFormatError: truncated, malformed, an unknown format or dtype, or shards that disagree.
        StorageError: the storage failed.
    """
    path = Path(path).expanduser()
    if os.path.isdir(path):
        path = weights_in_folder(path)
    if path.suffix != ".json":
        return _combine([_read_file(path)])
    weight_map = read_weight_map(path)
    shards = {shard: _read_file(path.parent / shard) for shard in sorted(set(weight_map.values()))}
    check_shards(path, weight_map, shards)
    return _combine(list(shards.values()))


def _read_file(path: Path) -> FileTensors:
    """Parse one file by its suffix, or by its first bytes if the suffix says nothing."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        return read_safetensors(path)
    if suffix in TORCH_SUFFIXES:
        return read_torch(path)
    with opened(path) as (descriptor, status):
        start = read_exactly(descriptor, path, 0, min(9, status.st_size))
    if start.startswith(ZIP_MAGIC):
        return read_torch(path)
    if start[8:] == b"{":
        return read_safetensors(path)
    raise WeightsFormatError(f"{path} is neither a safetensors file nor one of torch.save")


def _combine(files: list[FileTensors]) -> WeightsIndex:
    entries = {name: entry for file in files for name, entry in file.entries.items()}
    aliases = {other: name for file in files for other, name in file.aliases.items()}
    stamps = tuple(file.stamp for file in files)
    packed = all(file.packed for file in files)
    digests = {name: value for file in files for name, value in file.digests.items()} if packed else {}
    digest = (
        content_digest(entries.values(), digests, aliases)
        if packed
        else stamp_digest(entries.values(), aliases, stamps)
    )
    return WeightsIndex(entries, aliases, tuple(file.path for file in files), packed, digests, digest, stamps)
