"""The demo's weights files: made once, packed in execution order, used again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from narrowboat.checkpoint import open_index, pack
from narrowboat.errors import NarrowboatError, StorageError
from narrowboat.zoo import get

Progress = Callable[[int, int], None]


def work_folder(path: Path) -> Path:
    """Make the folder if it is not there.

    Raises:
        StorageError: it cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"making the folder {path}: {error.strerror}; give another one") from error
    if not os.access(path, os.W_OK):
        raise StorageError(f"the folder {path} cannot be written; give another one")
    return path


def packed_weights(name: str, folder: Path, progress: Callable[[str], Progress]) -> Path:
    """The packed weights of a zoo model in ``folder``: its real ones if it has some, else random ones.

    Args:
        name: zoo name.
        folder: where they are kept.
        progress: ``progress(what)`` begins a step and returns what to call with (done, total).

    Raises:
        StorageError: the disk is full, or failed.
    """
    path = folder / f"{name}.safetensors"
    if _usable(path):
        return path
    from narrowboat.profile.order import execution_order
    from narrowboat.zoo.save import save_random_weights

    model = get(name)
    if model.find_weights is not None:
        source = model.weights()
        pack(
            source,
            path,
            order=execution_order(model, open_index(source)),
            progress=progress(f"packing {name}"),
            overwrite=True,
        )
        return path
    source = folder / f"{name}.unordered.safetensors"
    try:
        save_random_weights(name, source, overwrite=True, progress=progress(f"making random weights for {name}"))
        pack(
            source,
            path,
            order=execution_order(model, open_index(source)),
            progress=progress(f"packing {name}"),
            overwrite=True,
        )
    finally:
        source.unlink(missing_ok=True)
    return path


def _usable(path: Path) -> bool:
    try:
        return path.exists() and open_index(path).packed
    except NarrowboatError:
        return False
