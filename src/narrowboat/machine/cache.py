"""The folder where narrowboat keeps what it has measured about this machine."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

import platformdirs


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """``NARROWBOAT_CACHE`` if set, else the user's cache folder. The folder need not exist yet."""
    chosen = (os.environ if environ is None else environ).get("NARROWBOAT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("narrowboat", appauthor=False))


def require_ordinary(path: Path) -> None:
    """Refuse a device, pipe or folder: renaming a file to its name would put the file in its place.

    Raises:
        OSError: ``path`` is there and is no ordinary file.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and is no ordinary file", str(path))


def write_durably(path: Path, text: str) -> None:
    """Write ``text`` so that a reader, even after a crash, finds the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be made or written.
    """
    require_ordinary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
