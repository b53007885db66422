"""Figures without a display, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from narrowboat.checkpoint.atomic_file import check_destination
from narrowboat.errors import StorageError, UsageError
from narrowboat.machine.cache import require_ordinary


def require_matplotlib() -> Any:
    """matplotlib's ``Figure``, which draws without a display and without pyplot's global state.

    Raises:
        UsageError: it is not installed; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("drawing needs matplotlib: pip install 'narrowboat[plot]'") from error
    return Figure


def check_picture(path: Path) -> None:
    """Refuse, before anything is worked out, a picture that could not be written in the end.

    Raises:
        UsageError: there is no such folder, ``path`` is a folder, or matplotlib is not installed.
    """
    require_matplotlib()
    check_destination(path, overwrite=True)


def save_png(figure: Any, path: Path) -> None:
    """Write ``figure`` to ``path`` through a temporary name.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        require_ordinary(path)
        with temporary.open("wb") as file:
            figure.savefig(file, format="png")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"writing {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
