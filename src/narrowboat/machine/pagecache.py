"""How much of a file is in the page cache, and getting it out.

Sources: mincore(2), posix_fadvise(2).
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

from narrowboat.errors import StorageError


def _cached_pages(fd: int, size: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    # A private writable mapping: ctypes only takes the address of writable memory, and the file stays untouched.
    with mmap.mmap(fd, size, access=mmap.ACCESS_COPY) as mapping:
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        states = (ctypes.c_ubyte * pages)()
        first = ctypes.c_char.from_buffer(mapping)
        try:
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), states)
        finally:
            del first  # the mapping cannot be closed while something points into it
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed")
        return bytes(state & 1 for state in states).count(1)


def cached_bytes(file: str | Path | int) -> int:
    """Bytes of ``file`` (a path or an open file descriptor) that are in the page cache now.

    Raises:
        StorageError: the file cannot be opened or mapped.
    """
    fd = -1
    try:
        fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(fd).st_size
        return _cached_pages(fd, size) * mmap.PAGESIZE if size else 0
    except OSError as error:
        raise StorageError(f"cannot tell how much of {file} is cached: {error.strerror or error}") from error
    finally:
        if not isinstance(file, int) and fd >= 0:
            os.close(fd)


def drop_cached(file: str | Path | int) -> None:
    """Write back what is dirty of ``file`` and let the kernel drop its clean pages.

    Raises:
        StorageError: the file cannot be opened or flushed.
    """
    fd = -1
    try:
        fd = file if isinstance(file, int) else os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise StorageError(f"cannot drop {file} from the page cache: {error.strerror or error}") from error
    finally:
        if not isinstance(file, int) and fd >= 0:
            os.close(fd)
