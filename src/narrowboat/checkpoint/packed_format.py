"""The layout of a packed file: plain safetensors in which every tensor begins and ends on a page.

The format forbids holes, so the space between tensors is taken by entries of dtype U8 named
``__narrowboat_pad__.0000`` and so on, and the header is padded with spaces (which JSON allows) until
the data begins on a page. All arithmetic is here; nothing here touches a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from narrowboat.checkpoint.digest import content_digest
from narrowboat.checkpoint.dtypes import SAFETENSORS_CODES
from narrowboat.checkpoint.entry import TensorEntry
from narrowboat.errors import WeightsFormatError

PAGE = 4096
PAD_PREFIX = "__narrowboat_pad__."
METADATA_KEY = "narrowboat"
VERSION = 1
_HEX = frozenset("0123456789abcdef")


def page_up(count: int) -> int:
    """``count`` bytes rounded up to whole pages."""
    return -(-count // PAGE) * PAGE


def is_aligned(entries: Iterable[TensorEntry], file_size: int) -> bool:
    """Whether every tensor begins on a page and the file ends on one."""
    return file_size % PAGE == 0 and all(entry.offset % PAGE == 0 for entry in entries)


@dataclass(frozen=True, slots=True)
class PackedMetadata:
    """What ``pack`` records in the header under ``__metadata__.narrowboat``.

    Attributes:
        order: canonical names in file order.
        digests: sha256 (hex) of each tensor's bytes.
        aliases: other names to the canonical name with the same bytes.
        digest: digest of the whole: names, dtypes, shapes, contents and ties.
    """

    order: tuple[str, ...]
    digests: Mapping[str, str]
    aliases: Mapping[str, str]
    digest: str

    def to_json(self) -> str:
        """The metadata as one line of JSON."""
        record = {
            "version": VERSION,
            "digest": self.digest,
            "order": list(self.order),
            "digests": dict(self.digests),
            "aliases": dict(self.aliases),
        }
        return json.dumps(record, separators=(",", ":"))

    def describes(self, tensors: Mapping[str, TensorEntry]) -> bool:
        """Whether ``tensors`` (names, dtypes, shapes) are those that were packed."""
        if self.digests.keys() != tensors.keys() or self.order != tuple(tensors):
            return False
        return self.digest == content_digest(tensors.values(), self.digests, self.aliases)


def parse_metadata(path: Path, text: str) -> PackedMetadata:
    """Read what :meth:`PackedMetadata.to_json` wrote.

    Raises:
        WeightsFormatError: not that, or written by a later version.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsFormatError(f"{path}: its narrowboat metadata is not valid JSON: {error}") from error
    version = record.get("version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise WeightsFormatError(f"{path}: its narrowboat metadata has no version")
    if version > VERSION:
        raise WeightsFormatError(f"{path} was packed by a later narrowboat (version {version}); upgrade narrowboat")
    order, digests, aliases, digest = (record.get(key) for key in ("order", "digests", "aliases", "digest"))
    if not (
        isinstance(order, list)
        and all(isinstance(name, str) for name in order)
        and isinstance(digests, dict)
        and all(_is_digest(value) for value in digests.values())
        and isinstance(aliases, dict)
        and all(isinstance(name, str) for name in aliases.values())
        and _is_digest(digest)
    ):
        raise WeightsFormatError(f"{path}: its narrowboat metadata is malformed; pack it again from the source")
    return PackedMetadata(tuple(order), digests, aliases, str(digest))


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and _HEX.issuperset(value)


def render_header(entries: Sequence[TensorEntry], metadata: PackedMetadata) -> bytes:
    """The first bytes of the file: length, JSON and spaces, a whole number of pages.

    ``entries`` are in file order; of their offsets only the order counts: each tensor is given the
    next page after the one before it. Digests have a fixed length, so a header rendered before they
    are known is as long as the one rendered after.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", METADATA_KEY: metadata.to_json()}}
    position = pads = 0
    for entry in entries:
        end = position + entry.nbytes
        header[entry.name] = {
            "dtype": SAFETENSORS_CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = page_up(end)
        if position > end:
            header[f"{PAD_PREFIX}{pads:04d}"] = {
                "dtype": "U8",
                "shape": [position - end],
                "data_offsets": [end, position],
            }
            pads += 1
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(page_up(8 + len(text)) - 8)
    return len(text).to_bytes(8, "little") + text


def tensor_offsets(entries: Sequence[TensorEntry], start: int) -> list[int]:
    """The absolute offset of each tensor when the data begins at ``start``; one more for the end of the file."""
    offsets = [start]
    for entry in entries:
        offsets.append(offsets[-1] + page_up(entry.nbytes))
    return offsets
