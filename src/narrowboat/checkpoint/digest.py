"""Digests: of contents for packed weights, of the files' stamps for weights nobody has read yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from narrowboat.checkpoint.entry import FileStamp, TensorEntry


def content_digest(entries: Iterable[TensorEntry], digests: Mapping[str, str], aliases: Mapping[str, str]) -> str:
    """Sha256 (hex) over names, dtypes, shapes, content digests and ties.

    It does not depend on the order or the offsets of the tensors, so the same weights packed in
    another order keep their identity.
    """
    rows = [[e.name, str(e.dtype), list(e.shape), digests[e.name]] for e in entries]
    return _of_json({"tensors": sorted(rows), "aliases": sorted(aliases.items())})


def stamp_digest(entries: Iterable[TensorEntry], aliases: Mapping[str, str], stamps: Iterable[FileStamp]) -> str:
    """Sha256 (hex) over what the headers say and over size, modification time and inode of the files."""
    rows = [[e.name, str(e.dtype), list(e.shape), e.offset, list(e.stride or ())] for e in entries]
    files = [[s.size, s.mtime_ns, s.inode] for s in stamps]
    return _of_json({"tensors": rows, "aliases": sorted(aliases.items()), "files": files})


def _of_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()
