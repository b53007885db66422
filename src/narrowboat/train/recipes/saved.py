"""What a training run leaves on disk: the weights for everybody, and its whole state to go on from."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.checkpoint.atomic_file import atomic_file
from narrowboat.errors import StorageError, UsageError, WeightsFormatError, WeightsMismatchError, WeightsNotFoundError
from narrowboat.train.weights.export import save_weights

_MARK = "narrowboat training state 1"


@dataclass(frozen=True, slots=True)
class SavedRun:
    """A state file, open; tensors are read when they are used.

    Attributes:
        path: the file.
        steps: made so far.
        settings: what has to be the same for the run to go on as it would have.
        held: model, optimizer and random state.
    """

    path: Path
    steps: int
    settings: dict[str, Any]
    held: dict[str, Any]

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse to go on with other settings.

        Raises:
            UsageError: names the first that differs.
        """
        for name, now in settings.items():
            before = self.settings.get(name)
            if before != now:
                raise UsageError(f"{self.path} is of a run with {name} {before}, and this one has {now}")

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the state into ``model`` and ``optimizer``, and the random stream where it was.

        Raises:
            WeightsMismatchError: they are others.
        """
        try:
            model.load_state_dict(self.held["model"])
            optimizer.load_state_dict(self.held["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            told = " ".join(str(error).split())[:300]
            raise WeightsMismatchError(f"{self.path} is the state of another model or optimizer: {told}") from error
        torch.set_rng_state(self.held["random"])


def state_path(out: Path) -> Path:
    """Where the state is kept that belongs to the weights file ``out``."""
    return out.with_name(f"{out.name}.state")


def save_run(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, settings: dict[str, Any]
) -> None:
    """Write the state beside ``out``, then the weights to ``out``; each appears whole or not at all.

    While it writes, an optimizer whose state is on storage has all of it in memory.

    Args:
        out: a plain safetensors file.
        model, optimizer: as they are after a whole step.
        steps: made so far.
        settings: see :class:`SavedRun`.

    Raises:
        UsageError: ``out`` is a folder, or is in none.
        StorageError: the storage failed, or is full.
    """
    content = {
        "mark": _MARK,
        "steps": steps,
        "settings": settings,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    path = state_path(out)
    with atomic_file(path, overwrite=True) as (descriptor, _):
        try:
            with os.fdopen(os.dup(descriptor), "wb") as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:  # torch's writer turns one into the other
            raise StorageError(f"writing {path}: {' '.join(str(error).split())[:200]}") from error
    save_weights(model, out, overwrite=True)


def open_run(path: Path) -> SavedRun:
    """Open a state file; no code in it is run.

    Raises:
        WeightsNotFoundError: there is no such file.
        WeightsFormatError: it is no state of a training run.
    """
    if not path.is_file():
        raise WeightsNotFoundError(f"{path} is no file: give the .state file that a run with --out left")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise WeightsFormatError(f"{path} is no training state that can be read") from error
    if damaged is not None:
        raise WeightsFormatError(f"{path} is damaged: {damaged} in it has another checksum; go on from another state")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling somebody's file fails in many ways
        raise WeightsFormatError(f"{path} is no training state that can be read") from error
    if not isinstance(held, dict) or held.get("mark") != _MARK:
        raise WeightsFormatError(f"{path} is no training state: give the .state file that a run with --out left")
    return SavedRun(path, int(held["steps"]), dict(held["settings"]), held)
