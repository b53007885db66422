"""The header of a safetensors file, parsed and checked without touching the tensors.

Format (https://github.com/huggingface/safetensors#format): eight bytes of little-endian header length,
the header as a JSON object from name to ``{"dtype", "shape", "data_offsets"}``, then the data, which the
tensors cover without holes or overlap. Parsed here rather than by the library because the absolute
offsets are what the stream reads by, and because a bad file shall be told by file and tensor.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from narrowboat.checkpoint.dtypes import TORCH_DTYPES
from narrowboat.checkpoint.entry import FileStamp, FileTensors, TensorEntry
from narrowboat.checkpoint.files import drop_cache, no_readahead, opened, read_exactly
from narrowboat.checkpoint.packed_format import METADATA_KEY, PAD_PREFIX, PackedMetadata, is_aligned, parse_metadata
from narrowboat.errors import WeightsFormatError

MAX_HEADER = 100_000_000  # the safetensors library's own limit


def read_safetensors(path: Path) -> FileTensors:
    """The tensors of the safetensors file ``path``, in file order, without padding entries.

    Raises:
        WeightsNotFoundError: no such file, or no permission.
        WeightsFormatError: not a safetensors file, truncated, or a header that contradicts itself.
        StorageError: the read failed.
    """
    with opened(path) as (descriptor, status):
        if status.st_size < 8:
            raise WeightsFormatError(f"{path} is not a safetensors file: {status.st_size} bytes hold no header")
        no_readahead(descriptor)
        length = int.from_bytes(read_exactly(descriptor, path, 0, 8), "little")
        if length > MAX_HEADER:
            raise WeightsFormatError(
                f"{path} is not a safetensors file: its first eight bytes ask for a header of {length} bytes"
            )
        if 8 + length > status.st_size:
            raise WeightsFormatError(
                f"{path} is truncated: its header takes {length} bytes, the file has {status.st_size}"
            )
        raw = read_exactly(descriptor, path, 8, length)
        drop_cache(descriptor, 0, 8 + length)
    header = _parse_json(path, raw)
    metadata = _text_metadata(path, header.pop("__metadata__", {}))
    start = 8 + length
    entries = _entries(path, header, start, status.st_size)
    tensors = {entry.name: entry for entry in entries if not entry.name.startswith(PAD_PREFIX)}
    stamp = FileStamp.of(status)
    if METADATA_KEY not in metadata:
        return FileTensors(path, stamp, tensors)
    packed = parse_metadata(path, metadata[METADATA_KEY])
    return _with_metadata(path, stamp, tensors, packed)


def _with_metadata(
    path: Path, stamp: FileStamp, tensors: dict[str, TensorEntry], packed: PackedMetadata
) -> FileTensors:
    """Add what ``pack`` wrote, if the file is still as ``pack`` wrote it."""
    clashing = next((other for other, name in packed.aliases.items() if name not in tensors or other in tensors), None)
    aligned = is_aligned(tensors.values(), stamp.size)
    if clashing is None and aligned and packed.describes(tensors):
        return FileTensors(path, stamp, tensors, dict(packed.aliases), packed=True, digests=dict(packed.digests))
    if aligned:
        raise WeightsFormatError(f"{path}: its header was altered after it was packed; pack it again from the source")
    # Another tool rewrote the file and kept the metadata: the ties are still of use, the digests are not.
    aliases = {other: name for other, name in packed.aliases.items() if name in tensors and other not in tensors}
    return FileTensors(path, stamp, tensors, aliases)


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise WeightsFormatError(f"{path} is not a safetensors file: its header does not start with '{{'")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise WeightsFormatError(f"{path}: its header names {twice!r} twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsFormatError(f"{path}: its header is not valid JSON: {error}") from error
    return dict(header)


def _text_metadata(path: Path, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsFormatError(f"{path}: __metadata__ in its header must map text to text")
    return metadata


def _entries(path: Path, header: dict[str, Any], start: int, size: int) -> list[TensorEntry]:
    """Check every tensor and that together they cover the data exactly; in order of offset."""
    entries = [_entry(path, name, spec, start) for name, spec in header.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.end))
    position = start
    for entry in entries:
        if entry.end > size:
            raise WeightsFormatError(
                f"{path} is truncated: tensor {entry.name!r} ends at byte {entry.end}, the file has {size}"
            )
        if entry.offset != position:
            what = "overlaps the one before it" if entry.offset < position else "leaves a hole before it"
            raise WeightsFormatError(f"{path}: tensor {entry.name!r} at byte {entry.offset} {what}")
        position = entry.end
    if position != size:
        raise WeightsFormatError(f"{path}: {size - position} bytes after the last tensor belong to none")
    return entries


def _entry(path: Path, name: str, spec: object, start: int) -> TensorEntry:
    where = f"{path}: tensor {name!r}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise WeightsFormatError(f"{where} has a name that is not valid text") from None
    if not isinstance(spec, dict) or not {"dtype", "shape", "data_offsets"} <= spec.keys():
        raise WeightsFormatError(f"{where} lacks dtype, shape or data_offsets")
    code, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    dtype = TORCH_DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise WeightsFormatError(f"{where} has the unknown dtype {code!r}; known are {', '.join(TORCH_DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise WeightsFormatError(f"{where} has the shape {shape!r}: sizes must be whole numbers from 0 on")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(value) for value in offsets):
        raise WeightsFormatError(f"{where} has the data_offsets {offsets!r}: must be two whole numbers from 0 on")
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise WeightsFormatError(
            f"{where} of shape {shape} and dtype {code} takes {nbytes} bytes, its data_offsets give {end - begin}"
        )
    return TensorEntry(name, dtype, tuple(shape), nbytes, path, start + begin)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
