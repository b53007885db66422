"""What the index knows of one tensor and of one file."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Piece:
    """``nbytes`` bytes at ``offset`` of ``file``."""

    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where the bytes of one tensor lie.

    Attributes:
        name: the tensor's name in the state dict.
        dtype: its element type.
        shape: its sizes.
        nbytes: elements times element size, in bytes.
        file: the file that holds it.
        offset: absolute byte offset of its first element in ``file``.
        stride: None when the bytes are C-contiguous and little endian, so that ``nbytes`` bytes from
            ``offset`` on are the tensor; else its strides in elements (a transposed or expanded view
            in a ``.pth`` file), which ``pack`` resolves and the stream does not read.
        pieces: the tensor's bytes one after the other, where they do not lie in one piece (experts that are stored
            one by one); ``file`` and ``offset`` are the first one's then.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int
    stride: tuple[int, ...] | None = None
    pieces: tuple[Piece, ...] = ()

    def cut(self, start: int, stop: int) -> list[tuple[int, Piece]]:
        """Where bytes ``[start, stop)`` of the tensor lie: places counted from ``start``, and what is there."""
        found: list[tuple[int, Piece]] = []
        at = 0
        for piece in self.pieces or (Piece(self.file, self.offset, self.nbytes),):
            low, high = max(start, at), min(stop, at + piece.nbytes)
            if low < high:
                found.append((low - start, Piece(piece.file, piece.offset + low - at, high - low)))
            at += piece.nbytes
        return found

    @property
    def contiguous(self) -> bool:
        """Whether ``nbytes`` bytes from ``offset`` on are the tensor as it is."""
        return self.stride is None

    @property
    def end(self) -> int:
        """Absolute byte offset just past the tensor's last element in ``file``."""
        if self.stride is None:
            return self.offset + self.nbytes
        if self.nbytes == 0:
            return self.offset
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.offset + (last + 1) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells that a file is still the one that was opened."""

    size: int
    mtime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        """The stamp in ``status``."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


@dataclass(frozen=True, slots=True)
class FileTensors:
    """The tensors of one file, as its parser found them.

    Attributes:
        path: the file.
        stamp: the file's identity when it was parsed.
        entries: canonical names to entries; no padding.
        aliases: other names to the canonical name with the same bytes.
        packed: every tensor page aligned, written by ``pack``.
        digests: sha256 (hex) per canonical name; empty unless packed.
    """

    path: Path
    stamp: FileStamp
    entries: dict[str, TensorEntry]
    aliases: dict[str, str] = field(default_factory=dict)
    packed: bool = False
    digests: dict[str, str] = field(default_factory=dict)
