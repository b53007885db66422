"""One file without a name, for bytes that are wanted back within the step.

The file never has a name in the folder (``O_TMPFILE``), or loses it at once: whatever ends the process, nothing is
left behind, and removing the folder does not disturb it. It is written and read with direct I/O, so that the page
cache holds no second copy; where the file system refuses that, the cache is dropped behind every chunk. It is never
mapped: a failing disk is an error of a call, not a SIGBUS.

Sources: open(2) on O_TMPFILE and O_DIRECT, posix_fallocate(3), pwritev(2), posix_fadvise(2).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from narrowboat.errors import SpillError
from narrowboat.machine.storage import filesystem_of
from narrowboat.quantities import format_bytes
from narrowboat.train.spill_slots import PAGE, Slots, rounded

log = logging.getLogger("narrowboat")
CHUNK = 4 << 20  # bytes per call: large enough for a disk to run at full speed with one call under way
_HUGE = 2 << 20
_MADV_HUGEPAGE = 14
_NO_TMPFILE = frozenset({errno.EISDIR, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOENT})
_NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
_ADVICE = {
    errno.ENOSPC: "free some space, or give another folder",
    errno.EDQUOT: "the quota is used up: free some space, or give another folder",
    errno.EFBIG: "a file may not grow that large here: raise the limit (ulimit -f), or give another folder",
    errno.EACCES: "check the permissions of the folder",
    errno.EPERM: "check the permissions of the folder",
    errno.EROFS: "give a folder that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "give a folder",
}


def spill_error(error: OSError, doing: str, folder: Path) -> SpillError:
    """The named error for ``error``, met while ``doing`` something in ``folder``."""
    advice = _ADVICE.get(error.errno or 0, "check the storage, or give another folder")
    if error.errno == errno.ENOSPC:
        with suppress(OSError):
            found = os.statvfs(folder)
            advice += f" ({format_bytes(found.f_bavail * found.f_frsize)} are free there)"
    return SpillError(f"{doing} in the spill folder {folder} failed: {error.strerror or error}; {advice}")


def fresh_storage(nbytes: int) -> tuple[torch.UntypedStorage, mmap.mmap]:
    """Page-aligned memory for ``nbytes`` bytes (more than 0), as a storage, and its mapping rounded up to whole pages.

    The storage keeps the mapping: the memory goes back to the system when the last tensor over it dies.

    Raises:
        MemoryError: the system has no such memory to give.
    """
    size = rounded(nbytes)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"cannot allocate {format_bytes(size)} for a spilled activation: {error.strerror}") from None
    if size >= _HUGE:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(_MADV_HUGEPAGE)  # page by page, zeroing costs about as much as the read
    with torch.inference_mode(False):
        return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes).untyped_storage(), memory


class SpillFile:
    """Slots of an unlinked file, written from memory and read into memory of its own.

    Reads may come from several threads; writes from one at a time, as they share the staging buffer.

    Args:
        folder: where the file is; it must exist and be writable.

    Attributes:
        direct: the page cache is passed by.
        refusal: why not, in words; empty if it is.
        in_memory: the folder is.
        bytes_written: bytes given to the file so far, the padding to whole pages included.
        bytes_read: likewise.

    Raises:
        SpillError: no such folder, not writable, no file can be made there.
        MemoryError: no memory for the staging buffer.
    """

    def __init__(self, folder: str | Path) -> None:
        self._fd = self._direct_fd = -1
        self.folder = Path(folder)
        self.direct, self.refusal = True, ""
        self.bytes_written = self.bytes_read = 0
        self._slots = Slots()
        self._count = threading.Lock()
        try:
            self.in_memory = filesystem_of(self.folder) in ("tmpfs", "ramfs")
            self._fd = _nameless(self.folder)
            # A second description of the same file: the flag can then be chosen call by call.
            self._direct_fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if self._fd < 0:
                raise spill_error(error, "making a file", self.folder) from error
            self._fall_back(error)
        try:
            self._staging = mmap.mmap(-1, CHUNK)
        except OSError as error:
            raise MemoryError(f"cannot allocate {format_bytes(CHUNK)} to write activations from") from error
        self._staging_address = ctypes.addressof(ctypes.c_char.from_buffer(self._staging))

    @property
    def closed(self) -> bool:
        """Whether its bytes are gone."""
        return self._fd < 0

    @property
    def size(self) -> int:
        """Bytes reserved in the folder."""
        return self._slots.end

    @property
    def taken(self) -> int:
        """Bytes of it that are in slots."""
        return self._slots.taken

    def reserve(self, nbytes: int) -> int:
        """The offset of a slot for ``nbytes`` bytes, with space on the storage behind it.

        Raises:
            SpillError: the disk is full, or a limit on files is reached; nothing is changed.
        """
        size = rounded(nbytes)
        if missing := self._slots.missing(size):
            try:
                os.posix_fallocate(self._fd, self._slots.end, missing)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
                    os.ftruncate(self._fd, self._slots.end + missing)  # no C library that stands in for it
                else:
                    os.ftruncate(self._fd, self._slots.end)  # what was found of the space goes back
                    raise spill_error(error, f"reserving {format_bytes(size)}", self.folder) from error
            self._slots.grow(missing)
        return self._slots.take(size)

    def free(self, offset: int, nbytes: int) -> None:
        """Give the slot for ``nbytes`` bytes at ``offset`` back."""
        self._slots.give(offset, rounded(nbytes))

    def write(self, offset: int, address: int, nbytes: int) -> None:
        """Write ``nbytes`` bytes of memory to the slot at ``offset``; memory that is not page-aligned is staged.

        Raises:
            SpillError: the write failed.
        """
        for at in range(0, nbytes, CHUNK):
            count = min(CHUNK, nbytes - at)
            if (address + at) % PAGE or count % PAGE:
                ctypes.memmove(self._staging_address, address + at, count)
                view = memoryview(self._staging)[: rounded(count)]
            else:
                view = memoryview((ctypes.c_char * count).from_address(address + at)).cast("B")
            self._transfer(view, offset + at, writing=True)

    def read(self, offset: int, nbytes: int) -> torch.UntypedStorage:
        """The ``nbytes`` bytes (more than 0) of the slot at ``offset``, in memory of their own.

        Raises:
            SpillError: the read failed.
            MemoryError: no memory for them.
        """
        storage, memory = fresh_storage(nbytes)
        view = memoryview(memory)
        for at in range(0, len(view), CHUNK):
            self._transfer(view[at : at + CHUNK], offset + at, writing=False)
        return storage

    def sync(self) -> None:
        """Return when what was written is on the device, and none of it in the page cache."""
        try:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise spill_error(error, "writing", self.folder) from error

    def close(self) -> None:
        """Let the file go; its space is free at once."""
        self._fd, fd = -1, self._fd
        self._direct_fd, direct_fd = -1, self._direct_fd
        for each in (fd, direct_fd):
            if each >= 0:
                os.close(each)

    def __del__(self) -> None:
        self.close()

    def _transfer(self, view: memoryview, offset: int, *, writing: bool) -> None:
        try:
            self._move(view, offset, os.pwritev if writing else os.preadv)
            if not self.direct:
                if writing:
                    os.fdatasync(self._fd)  # what is dirty would not be dropped
                os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise spill_error(error, "writing" if writing else "reading", self.folder) from error
        with self._count:
            if writing:
                self.bytes_written += len(view)
            else:
                self.bytes_read += len(view)

    def _move(self, view: memoryview, offset: int, call: Callable[[int, list[memoryview], int], int]) -> None:
        done = 0
        while done < len(view):
            direct = self.direct
            try:
                count = call(self._direct_fd if direct else self._fd, [view[done:]], offset + done)
            except OSError as error:
                if not direct or error.errno not in _NO_DIRECT:
                    raise
                self._fall_back(error)
                continue
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than it was")
            done += count
            if direct and done % PAGE:
                if count < PAGE:
                    self._fall_back(OSError(errno.EINVAL, "transfers shorter than a page"))
                else:
                    done -= done % PAGE  # direct transfers go on from a page boundary only

    def _fall_back(self, error: OSError) -> None:
        if self.direct:
            self.direct, self.refusal = False, error.strerror or "refused"
            log.warning(
                "spill folder %s: direct I/O refused (%s); going through the page cache, dropped behind each chunk",
                self.folder,
                self.refusal,
            )


def _nameless(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE or not folder.is_dir():
            raise
    fd, name = tempfile.mkstemp(dir=folder, prefix=".narrowboat-spill-")
    os.unlink(name)
    return fd
