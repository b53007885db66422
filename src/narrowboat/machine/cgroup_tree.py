"""Where this process stands in the control group trees (v1, v2 and the hybrid of both).

Sources: cgroups(7), ``/proc/self/cgroup`` and ``/proc/self/mountinfo``. Every function takes the root of
the file system as a parameter, so that a tree written by a test is read as the real one is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class OwnCgroup:
    """The control group of this process for one controller.

    Attributes:
        folder: the group's folder.
        mount: the highest folder of that hierarchy that this process can see.
        version: 1 or 2.
    """

    folder: Path
    mount: Path
    version: int

    @property
    def name(self) -> str:
        """The group's path below the mount point, e.g. ``'/user.slice'``."""
        return group_name(self.folder, self.mount)

    def upwards(self) -> Iterator[Path]:
        """The group's folder, then each ancestor's up to the mount point: every limit on the way applies."""
        folder = self.folder
        while True:
            yield folder
            if folder == self.mount:
                return
            folder = folder.parent


def group_name(folder: Path, mount: Path) -> str:
    """``folder`` as a path below ``mount``, starting with a slash."""
    return "/" + str(folder.relative_to(mount)).removeprefix(".")


def read_text(path: Path) -> str | None:
    """The stripped text of a kernel file, or None when it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """The number in a kernel file; None when it is absent, not a number, or ``max``."""
    text = read_text(path)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return None


def read_stat(path: Path) -> dict[str, int]:
    """A file of ``key value`` lines, e.g. ``memory.stat``; empty when it cannot be read."""
    values: dict[str, int] = {}
    for line in (read_text(path) or "").splitlines():
        key, _, number = line.partition(" ")
        if number.strip().isdigit():
            values[key] = int(number)
    return values


def _below(root: Path, absolute: str) -> Path:
    return root / absolute.lstrip("/")


def _mounts(root: Path) -> Iterator[tuple[str, str, str, str]]:
    """(mounted subtree, mount point, file system type, super options) of every mount."""
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        left, dash, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if dash and len(before) >= 5 and len(after) >= 3:
            subtree, point = (_OCTAL.sub(lambda m: chr(int(m.group(1), 8)), text) for text in before[3:5])
            yield subtree, point, after[0], after[2]


def _memberships(root: Path) -> Iterator[tuple[int, frozenset[str], str]]:
    """(version, controllers, path) for each line of ``/proc/self/cgroup``."""
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            yield 2 if parts[0] == "0" and not parts[1] else 1, frozenset(parts[1].split(",")), parts[2]


def own_cgroup(controller: str, root: Path = ROOT) -> OwnCgroup | None:
    """The group of this process under ``controller`` (``"memory"``, ``"cpu"``).

    A version 1 hierarchy that carries the controller wins, as in the kernel a controller is in one
    hierarchy only; otherwise version 2. None where there is neither, or none is mounted.
    """
    mounts = list(_mounts(root))
    for version, controllers, path in sorted(_memberships(root), key=lambda item: item[0]):
        if version == 1 and controller not in controllers:
            continue
        for subtree, point, kind, options in mounts:
            fits = kind == "cgroup2" if version == 2 else kind == "cgroup" and controller in options.split(",")
            if not fits:
                continue
            mount = _below(root, point)
            # A container sees its own subtree mounted, while the membership may be told from the host's root.
            try:
                inner = PurePosixPath(path).relative_to(subtree)
            except ValueError:
                inner = PurePosixPath(".")
            folder = mount.joinpath(*(part for part in inner.parts if part != ".."))
            return OwnCgroup(folder if folder.is_dir() else mount, mount, version)
    return None
