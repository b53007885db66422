"""Opening, reading and writing with errors that name the file; the page cache is not left filled."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from narrowboat.errors import (
    NarrowboatError,
    StorageError,
    WeightsChangedError,
    WeightsFormatError,
    WeightsNotFoundError,
)

CHUNK = 8 * 2**20
_NOT_FOUND = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def storage_error(error: OSError, doing: str) -> NarrowboatError:
    """The named error for ``error``, met while ``doing`` (such as ``"reading a.safetensors"``)."""
    reason = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM):
        return WeightsNotFoundError(f"{doing}: {reason}; check the permissions")
    if error.errno in _NOT_FOUND:
        return WeightsNotFoundError(f"{doing}: {reason}; check the path")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{doing}: {reason}; free some space or write to another disk")
    return StorageError(f"{doing}: {reason}")


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open the regular file ``path`` for reading; yield its descriptor and status.

    Raises:
        WeightsNotFoundError: no such file, a folder, or no permission.
        WeightsFormatError: a pipe, socket or device.
        StorageError: any other failure of the storage.
    """
    try:
        # O_NONBLOCK: a pipe without a writer would otherwise block here for ever; no effect on files.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise storage_error(error, f"opening {path}") from error
    except ValueError as error:  # a NUL byte in the path
        raise WeightsNotFoundError(f"opening {str(path)!r}: {error}; check the path") from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise WeightsNotFoundError(f"{path} is a folder, not a weights file")
        if not stat.S_ISREG(status.st_mode):
            raise WeightsFormatError(f"{path} is not a regular file")
        yield descriptor, status
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, path: Path, offset: int, count: int) -> bytes:
    """``count`` bytes of ``path`` from ``offset`` on, for headers.

    Raises:
        WeightsFormatError: the file ends before.
        StorageError: the read failed.
    """
    pieces: list[bytes] = []
    while count > 0:
        try:
            piece = os.pread(descriptor, count, offset)
        except OSError as error:
            raise storage_error(error, f"reading {path}") from error
        if not piece:
            raise WeightsFormatError(f"{path} is truncated: it ends at byte {offset}")
        pieces.append(piece)
        offset += len(piece)
        count -= len(piece)
    return b"".join(pieces)


def read_chunks(descriptor: int, path: Path, offset: int, count: int, buffer: bytearray) -> Iterator[memoryview]:
    """Yield ``count`` bytes of ``path`` from ``offset`` on, in pieces that live until the next one.

    The pages read are dropped from the page cache, so that a model twice the size of memory passes
    through without pushing anything out.

    Raises:
        WeightsChangedError: the file ends before: it was truncated after it was opened.
        StorageError: the read failed.
    """
    view = memoryview(buffer)
    start, end = offset, offset + count
    while offset < end:
        try:
            got = os.preadv(descriptor, [view[: min(len(view), end - offset)]], offset)
        except OSError as error:
            raise storage_error(error, f"reading {path}") from error
        if got == 0:
            raise WeightsChangedError(f"{path} was truncated while it was read: it ends at byte {offset}")
        yield view[:got]
        offset += got
    drop_cache(descriptor, start, count)


def write_all(descriptor: int, path: Path, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``.

    Raises:
        StorageError: disk full, or any other failure of the storage.
    """
    view = memoryview(data)
    while len(view) > 0:
        try:
            done = os.pwrite(descriptor, view, offset)
        except OSError as error:
            raise storage_error(error, f"writing {path}") from error
        view = view[done:]
        offset += done


def no_readahead(descriptor: int) -> None:
    """Ask the kernel to read what is asked for and nothing beside it, for scattered reads of headers."""
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    except OSError:
        return


def drop_cache(descriptor: int, offset: int = 0, count: int = 0) -> None:
    """Ask the kernel to drop clean cached pages of a range (``count`` 0: up to the end); advice only."""
    try:
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
    except OSError:
        return
