"""A file that appears whole or not at all, whatever kills the writer."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from narrowboat.errors import StorageError, UsageError


@contextmanager
def atomic_file(dest: Path, *, overwrite: bool) -> Iterator[tuple[int, Path]]:
    """Yield an empty temporary file in ``dest``'s folder; on success sync it and rename it to ``dest``.

    The temporary name is fixed (``.NAME.packing``), so what a killed run left behind is overwritten
    by the next; a lock on it, which dies with its process, keeps two writers apart. Any exception in
    the block, KeyboardInterrupt included, removes it.

    Raises:
        UsageError: ``dest`` exists and ``overwrite`` is false, is a folder, or has no folder to be in.
        StorageError: another process is writing ``dest``, or the storage failed.
    """
    check_destination(dest, overwrite=overwrite)
    temporary = dest.with_name(f".{dest.name}.packing")
    descriptor = _open_locked(temporary, dest)
    try:
        yield descriptor, temporary
        check_destination(dest, overwrite=overwrite)
        try:
            os.fsync(descriptor)
            os.replace(temporary, dest)
        except OSError as error:
            raise StorageError(f"writing {dest}: {error.strerror}") from error
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        os.close(descriptor)
    _sync_folder(dest.parent)


def check_destination(dest: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is worked out, a file that could not be written in the end.

    Raises:
        UsageError: ``dest`` is a folder, lies in none, or exists and is not to be overwritten.
    """
    if os.path.isdir(dest):
        raise UsageError(f"{dest} is a folder; give the name of the file to write")
    if not os.path.isdir(dest.parent):
        raise UsageError(f"cannot write {dest}: there is no folder {dest.parent}")
    if not overwrite and os.path.lexists(dest):
        raise UsageError(f"{dest} exists already; choose another name, or overwrite it (--overwrite, overwrite=True)")


def _open_locked(temporary: Path, dest: Path) -> int:
    while True:
        try:
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StorageError(f"writing {dest}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno == errno.EWOULDBLOCK:
                    raise StorageError(f"another process is writing {dest} now; wait for it to end") from error
                # A file system without locks: two writers at once are then the user's to avoid.
            # The writer before us may have renamed or removed the file between our open and our lock.
            if _is_at(descriptor, temporary):
                os.ftruncate(descriptor, 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable. Some file systems cannot sync folders; the file is whole all the same."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
