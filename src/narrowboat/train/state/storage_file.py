"""A file of a fixed size for records: reserved up front, read and written past the page cache where that works.

Sources: open(2) on O_DIRECT and O_TMPFILE, posix_fallocate(3) (a file without reserved blocks that is mapped or
written later dies of a full disk at the worst moment), posix_fadvise(2).
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from narrowboat.checkpoint.files import drop_cache, no_readahead
from narrowboat.errors import SpillError
from narrowboat.quantities import format_bytes
from narrowboat.train.state.layout import PAGE

log = logging.getLogger("narrowboat")
_CHUNK = 8 << 20
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_O_DIRECT = getattr(os, "O_DIRECT", 0)


def spill_error(error: OSError, doing: str) -> SpillError:
    """The named error for ``error``, met while ``doing`` (such as ``"writing state in runs/1"``)."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return SpillError(f"{doing}: {reason}; free some space there or name another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return SpillError(f"{doing}: {reason}; name a folder that can be written")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return SpillError(f"{doing}: {reason}; the folder is gone or never was")
    return SpillError(f"{doing}: {reason}")


class StorageFile:
    """A file with reserved space, safe for use by several threads; it is made, or opened, by :meth:`open`.

    Args:
        path: of the file; for a temporary one, its folder.
        temporary: without a name from the start, so that whatever kills the process nothing is left behind.

    Attributes:
        fd: its descriptor; -1 while it is not open.
        size: bytes reserved.
        direct: the page cache is bypassed; otherwise it is dropped behind every read and write.
        bytes_read, bytes_written: over all time.
    """

    def __init__(self, path: Path, *, temporary: bool) -> None:
        self._path, self._temporary = path, temporary
        self._where = str(path)
        self.fd = -1
        self.size = 0
        self.direct = False
        self.bytes_read = 0
        self.bytes_written = 0
        self._lock = threading.Lock()

    def open(self) -> None:
        """Open the file, which is made if it is not there, and keep others out of it.

        Raises:
            SpillError: the file cannot be made, or another process has it.
        """
        path, temporary = self._path, self._temporary
        self.size, self.direct = 0, False
        try:
            self.fd = _nameless(path) if temporary else os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise spill_error(error, f"making a file in {path if temporary else path.parent}") from error
        if not temporary:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    os.close(self.fd)
                    self.fd = -1
                    raise SpillError(
                        f"{path} is in use by another process, or by a step of this one that was not closed; wait for "
                        "its end, or close() it"
                    ) from error
                # A file system without locks: two runs in one folder are then the user's to avoid.

    def reserve(self, size: int) -> None:
        """Make the file at least ``size`` bytes, all of them allocated.

        Raises:
            SpillError: the disk is full, or a limit on file sizes is met; the file is as it was.
        """
        if size <= self.size:
            return
        try:
            os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self.fd, self.size)
            raise spill_error(error, f"reserving {format_bytes(size)} in {self._where}") from error
        no_readahead(self.fd)  # where direct I/O is refused, what lies behind a record would be read and stay cached
        first, self.size = self.size == 0, size
        if first:
            self._try_direct()

    def _try_direct(self) -> None:
        if not _O_DIRECT:
            return
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | _O_DIRECT)
            with mmap.mmap(-1, PAGE) as page:
                os.preadv(self.fd, [page], 0)
            self.direct = True
        except OSError as error:
            self._fall_back(error.strerror or "refused")

    def _fall_back(self, reason: str) -> None:
        fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) & ~_O_DIRECT)
        self.direct = False
        log.info("%s: direct I/O refused (%s); the page cache is dropped behind each access", self._where, reason)

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill page-aligned ``memory`` (whole pages) from ``offset`` on.

        Raises:
            SpillError: the storage failed, or the file was cut short.
        """
        self._move(memory, offset, reading=True)
        if not self.direct:
            drop_cache(self.fd, offset, len(memory))

    def write(self, memory: memoryview, offset: int) -> None:
        """Write page-aligned ``memory`` (whole pages) at ``offset``.

        Raises:
            SpillError: the storage failed.
        """
        self._move(memory, offset, reading=False)
        if not self.direct:
            try:
                os.fdatasync(self.fd)
            except OSError as error:
                raise spill_error(error, f"writing in {self._where}") from error
            drop_cache(self.fd, offset, len(memory))

    def _move(self, memory: memoryview, offset: int, *, reading: bool) -> None:
        at = 0
        while at < len(memory):
            piece = memory[at : at + _CHUNK]
            try:
                call = os.preadv if reading else os.pwritev
                done = call(self.fd, [piece], offset + at)
            except OSError as error:
                if self.direct and error.errno in _REFUSED:
                    self._fall_back(error.strerror or "refused")
                    continue
                raise spill_error(error, f"{'reading' if reading else 'writing'} in {self._where}") from error
            if done == 0:
                raise SpillError(f"{self._where} was cut short: it ends at byte {offset + at}")
            at += done
        with self._lock:
            if reading:
                self.bytes_read += at
            else:
                self.bytes_written += at

    def sync(self) -> None:
        """Make all that was written durable.

        Raises:
            SpillError: the storage failed.
        """
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise spill_error(error, f"writing in {self._where}") from error

    def close(self) -> None:
        """Release the descriptor; a temporary file's space goes with it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if "fd" in self.__dict__:
            self.close()


def _nameless(folder: Path) -> int:
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (*_REFUSED, errno.EISDIR):
            raise
    # A file system without O_TMPFILE: a name, for as long as it takes to drop it.
    fd, name = tempfile.mkstemp(prefix=".narrowboat-", dir=folder)
    os.unlink(name)
    return fd
