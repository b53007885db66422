"""Figures without a display, written whole or not at all."""

from __future__ import annotations

import io
import os
import warnings
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


def picture_bytes(figure: Any, form: str, name: str = "") -> bytes:
    """``figure`` as the bytes of a file.

    Args:
        figure: matplotlib's.
        form: ``"png"`` or ``"svg"``.
        name: of the picture; ids within an SVG are made from it, so that the same picture is the same bytes.
    """
    from narrowboat.report.draw.theme import themed

    kept = io.BytesIO()
    with themed(**{"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script the font has not
        figure.savefig(kept, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return kept.getvalue()


def save_png(figure: Any, path: Path) -> None:
    """Write ``figure`` to ``path`` through a temporary name.

    Raises:
        StorageError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        require_ordinary(path)
        with temporary.open("wb") as file:
            file.write(picture_bytes(figure, "png"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"writing {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
