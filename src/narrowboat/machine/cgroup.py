"""A memory control group of one's own: a limit that the kernel enforces, to prove that a budget holds.

The group is a child of the one this process is in, so no limit already in force is loosened. Under version 2,
where a group with processes in it cannot hand the memory controller to children, it is a sibling instead, and
only if this process's own group has no memory limit that a sibling would escape.

Sources: the kernel's cgroup-v1 memory and cgroup-v2 documents.
"""

from __future__ import annotations

import itertools
import os
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from narrowboat.errors import NarrowboatError
from narrowboat.machine.cgroup_tree import ROOT, OwnCgroup, own_cgroup, read_int, read_stat, read_text

_PREFIX = "narrowboat-"
_REMOVE_SECONDS = 5.0
_numbers = itertools.count()


def _hands_down_memory(folder: Path) -> bool:
    return "memory" in (read_text(folder / "cgroup.subtree_control") or "").split()


def parent_for(own: OwnCgroup) -> Path:
    """The folder in which a memory cgroup for children of this process can be made.

    Raises:
        NarrowboatError: there is none, with the reason.
    """
    if own.version == 1 or _hands_down_memory(own.folder):
        return own.folder
    if "memory" not in (read_text(own.folder / "cgroup.controllers") or "").split():
        raise NarrowboatError(f"the memory controller is not handed down to the cgroup {own.name}")
    try:
        (own.folder / "cgroup.subtree_control").write_text("+memory", encoding="ascii")
    except OSError as error:
        limited = any(read_int(own.folder / name) is not None for name in ("memory.max", "memory.high"))
        above = own.folder.parent
        if own.folder != own.mount and not limited and _hands_down_memory(above):
            return above
        raise NarrowboatError(
            f"the cgroup {own.name} cannot give a memory limit to children ({error.strerror}); "
            "try under `systemd-run --user --scope`, or in a container with a writable cgroup of its own"
        ) from error
    return own.folder


def _sweep(parent: Path) -> None:
    """Remove groups left by narrowboat processes that were killed; the kernel removes only empty ones."""
    for folder in parent.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            with suppress(OSError):
                folder.rmdir()


class MemoryCgroup:
    """A memory cgroup with a limit; swap does not extend it. Removed at the end of the ``with`` block.

    Put a child into it before it runs anything::

        with MemoryCgroup(300 << 20) as group:
            child = subprocess.Popen(command, preexec_fn=group.enter)
            child.wait()
            print(group.peak(), group.oom_kills())

    Args:
        limit: bytes: everything charged counts, page cache included.

    Raises:
        NarrowboatError: no such group can be made here; the message says why.
    """

    def __init__(self, limit: int, *, root: Path = ROOT) -> None:
        own = own_cgroup("memory", root)
        if own is None:
            raise NarrowboatError("no memory cgroup hierarchy is mounted here")
        parent = parent_for(own)
        self.version = own.version
        self.limit = limit
        self.folder = parent / f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        _sweep(parent)
        try:
            self.folder.mkdir()
        except OSError as error:
            raise NarrowboatError(f"cannot make a memory cgroup in {parent}: {error.strerror}") from error
        try:
            self.set_limit(limit)
        except OSError as error:
            with suppress(OSError):
                self.folder.rmdir()
            raise NarrowboatError(f"cannot limit the memory cgroup {self.folder}: {error.strerror}") from error
        self._procs = self.folder / "cgroup.procs"

    def set_limit(self, limit: int) -> None:
        """Change the limit. Raises OSError where the kernel refuses (version 1: below what cannot be reclaimed)."""
        self.limit = limit
        first, swap, swap_limit = (
            ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", limit)
            if self.version == 1
            else ("memory.max", "memory.swap.max", 0)
        )
        (self.folder / first).write_text(str(limit), encoding="ascii")
        # Both are absent on kernels without swap accounting.
        if (self.folder / swap).exists():
            (self.folder / swap).write_text(str(swap_limit), encoding="ascii")

    def enter(self) -> None:
        """Move the calling process in: for ``subprocess.Popen(preexec_fn=group.enter)``."""
        # Between fork and exec: plain system calls only, no locks of the parent's threads.
        fd = os.open(self._procs, os.O_WRONLY)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)

    def add(self, pid: int) -> None:
        """Move process ``pid`` in. What it holds already may stay charged to its old group.

        Raises:
            NarrowboatError: no such process, or no right to move it.
        """
        try:
            self._procs.write_text(str(pid), encoding="ascii")
        except OSError as error:
            raise NarrowboatError(f"cannot move process {pid} into {self.folder}: {error.strerror}") from error

    def current(self) -> int:
        """Bytes charged now, page cache included."""
        return read_int(self.folder / ("memory.usage_in_bytes" if self.version == 1 else "memory.current")) or 0

    def peak(self) -> int | None:
        """The most bytes charged at any moment; None on version 2 before Linux 5.19, which does not keep it."""
        return read_int(self.folder / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak"))

    def page_cache(self) -> int:
        """Bytes of page cache charged now."""
        stat = read_stat(self.folder / "memory.stat")
        return stat.get("active_file", 0) + stat.get("inactive_file", 0)

    def oom_kills(self) -> int:
        """How many processes the kernel has killed here for passing the limit."""
        return read_stat(self.folder / ("memory.oom_control" if self.version == 1 else "memory.events")).get(
            "oom_kill", 0
        )

    def remove(self) -> None:
        """Remove the group; nothing happens if it is gone already. The processes in it must have ended.

        Raises:
            NarrowboatError: processes are still in it after five seconds.
        """
        deadline = time.monotonic() + _REMOVE_SECONDS
        while True:
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError as error:
                # A killed process leaves its group a moment after it has been waited for.
                if time.monotonic() > deadline:
                    left = (read_text(self._procs) or "").split()
                    raise NarrowboatError(
                        f"cannot remove the memory cgroup {self.folder}: {error.strerror}; processes in it: {left}"
                    ) from error
                time.sleep(0.01)

    def __enter__(self) -> MemoryCgroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def writable_memory_cgroup() -> str | None:
    """None where a :class:`MemoryCgroup` can be made; otherwise the reason why not."""
    try:
        MemoryCgroup(1 << 30).remove()
    except NarrowboatError as error:
        return str(error)
    return None
