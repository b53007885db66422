"""The files that inputs are read from; looked for before anything is measured."""

from __future__ import annotations

from pathlib import Path

from narrowboat.errors import TaskSpecError
from narrowboat.tasks.spec.schema import TasksSpec

_MOST_FILES = 64
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".npy")


def check_inputs(settings: TasksSpec, folder: Path) -> None:
    """All input files and folders are there.

    Raises:
        TaskSpecError: one is not.
    """
    for task in settings.tasks:
        if task.input is None:
            continue
        if task.input.folder is not None:
            input_files(folder / task.input.folder)
        if task.input.file is not None and not (folder / task.input.file).is_file():
            raise TaskSpecError(f"task {task.name!r}: there is no input file {folder / task.input.file}")


def input_files(folder: Path) -> list[Path]:
    """Images and arrays of a folder, by name.

    Raises:
        TaskSpecError: there are none, or too many to be kept.
    """
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
    except OSError as error:
        raise TaskSpecError(f"input folder {folder}: {error.strerror}") from error
    if not found:
        raise TaskSpecError(f"input folder {folder} has no image or .npy file")
    if len(found) > _MOST_FILES:
        raise TaskSpecError(
            f"input folder {folder} has {len(found)} files; {_MOST_FILES} at most are kept in memory: use a generator"
        )
    return found
