"""Everything that the numbers depend on, as far as it can be told without touching the device."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "accelerate", "diffusers", "flextensor", "safetensors", "cuda-bindings")
_SHM = Path("/dev/shm")
_SPARE, _COPIES = 1.2, 5  # times the largest file: of the folder in memory, and of the memory that is available


def facts() -> dict[str, Any]:
    """Of the host."""
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "processor": _line("/proc/cpuinfo", "model name") or platform.machine(),
        "host_bytes": _kibibytes("MemTotal"),
        "packages": {name: number for name in _PACKAGES if (number := _version(name))},
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT"),
    }


def commit() -> str:
    """Of the working tree, with a plus where it has changes."""
    folder = Path(__file__).resolve().parent
    try:
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
        changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, cwd=folder)
    except OSError:
        return "unknown"
    return (told.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def folder_in_memory(largest: int) -> Path | None:
    """A folder in memory with room for the largest file, on a host with room for what is made of it; or None."""
    try:
        room = os.statvfs(_SHM)
    except OSError:
        return None
    free = room.f_bavail * room.f_frsize
    enough = free > _SPARE * largest and _kibibytes("MemAvailable") > _COPIES * largest
    return _SHM if enough and os.access(_SHM, os.W_OK) else None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def _kibibytes(name: str) -> int:
    return int(_line("/proc/meminfo", name).split()[0] or 0) << 10
