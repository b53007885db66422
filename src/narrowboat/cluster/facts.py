"""What decides on a node whether it gives the same bits, and what its costs mean: versions, machine, weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path

from narrowboat import __version__
from narrowboat.tasks.spec.schema import TaskSpec

_DECISIVE = ("narrowboat", "torch", "transformers", "safetensors")
_SAMPLES = 64  # pieces of a weights file that are compared, beside its size
_PIECE = 64 << 10  # bytes
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def versions() -> dict[str, str]:
    """Of what decides about bits and costs; what is not installed is not listed."""
    found = {"narrowboat": __version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for name in _DECISIVE[1:]:
        try:
            # A local part, as in 2.13.0+cpu, says how it was built, and a GPU build may stand beside a CPU one.
            found[name] = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def differing(here: dict[str, str], there: dict[str, str]) -> str:
    """What is not the same, in words; "" if all is. Only what both have is compared."""
    return ", ".join(
        f"{name} {there[name]} instead of {here[name]}" for name in here if there.get(name, here[name]) != here[name]
    )


def about_this_machine() -> dict[str, object]:
    """Who a node is."""
    return {"host": platform.node(), "pid": os.getpid(), "cores": len(os.sched_getaffinity(0)), "versions": versions()}


def weights_digest(spec: TaskSpec, folder: Path) -> str:
    """What tells a task's weights from others: size and samples of each file, headers included; "" where it has none.

    A packed file's header holds the digest of all its bytes, so that for those the comparison is exact.

    Raises:
        OSError: a file cannot be read.
    """
    files = _files(spec, folder)
    if not files:
        return ""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}:".encode())
        sample(path, digest.update)
    return digest.hexdigest()[:32]


def sample(path: Path, update: Callable[[bytes], object]) -> None:
    """Tell a digest a file's size, and pieces of it from its beginning to its end.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    update(f"{size};".encode())
    step = max((size - _PIECE) // _SAMPLES, _PIECE)
    with path.open("rb") as stream:
        for offset in range(0, max(size, 1), step):
            stream.seek(offset)
            update(stream.read(_PIECE))


def _files(spec: TaskSpec, folder: Path) -> list[Path]:
    named = spec.weights
    if named is None and spec.model is not None and ":" not in spec.model:  # a Hugging Face folder
        named = spec.model
    if named is None and spec.model is not None and spec.model.startswith(("text:", "embed:")):
        named = spec.model.partition(":")[2].partition("?")[0]
    if named is None:
        return []
    path = folder / named
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    return [path]
