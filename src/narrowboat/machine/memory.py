"""What memory this process uses, and how much more it can take.

Sources: proc(5) (``/proc/PID/status``, ``clear_refs``, ``/proc/meminfo``), the kernel's cgroup-v1 memory and
cgroup-v2 documents, setrlimit(2).
"""

from __future__ import annotations

import mmap
import resource
from dataclasses import dataclass
from pathlib import Path

from narrowboat.errors import NarrowboatError
from narrowboat.machine.cgroup_tree import ROOT, group_name, own_cgroup, read_int, read_stat, read_text
from narrowboat.quantities import format_bytes

# Version 1 writes "no limit" as the largest page-aligned int64; nothing near it is a limit anybody set.
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident memory of one process, in bytes.

    Attributes:
        rss: resident now; the sum of the next three.
        anon: anonymous pages (heap, arenas, stacks).
        file: pages of mapped files.
        shmem: shared memory and tmpfs pages mapped.
        hwm: the highest ``rss`` since the process started or :func:`reset_peak`.
        size: address space, resident or not.
        data: private writable address space, which RLIMIT_DATA limits.
    """

    rss: int
    anon: int
    file: int
    shmem: int
    hwm: int
    size: int
    data: int


def parse_status(text: str) -> ProcessMemory:
    """Read the text of ``/proc/PID/status``; a line that is not there counts as 0 (zombies, kernel threads)."""
    sizes: dict[str, int] = {}
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            sizes[key] = int(words[0]) * 1024
    rss = sizes.get("VmRSS", 0)
    return ProcessMemory(
        rss=rss,
        anon=sizes.get("RssAnon", 0),
        file=sizes.get("RssFile", 0),
        shmem=sizes.get("RssShmem", 0),
        hwm=max(sizes.get("VmHWM", 0), rss),
        size=sizes.get("VmSize", 0),
        data=sizes.get("VmData", 0),
    )


def process_memory(pid: int | None = None, root: Path = ROOT) -> ProcessMemory:
    """The memory of process ``pid``, or of this one.

    Raises:
        NarrowboatError: no such process, or a system without ``/proc``.
    """
    who = "self" if pid is None else str(pid)
    text = read_text(root / "proc" / who / "status")
    if text is None:
        raise NarrowboatError(
            f"cannot read /proc/{who}/status: the process has ended, or this system has no /proc (Linux is needed)"
        )
    return parse_status(text)


def resident_bytes() -> int:
    """Resident memory of this process, quickly (a microsecond or two); 0 without ``/proc``."""
    return _resident_and_shared()[0]


def private_bytes() -> int:
    """Resident memory of this process but for mapped files and shared memory, quickly; 0 without ``/proc``."""
    resident, shared = _resident_and_shared()
    return resident - shared


def _resident_and_shared() -> tuple[int, int]:
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            fields = file.read(64).split()
        return int(fields[1]) * mmap.PAGESIZE, int(fields[2]) * mmap.PAGESIZE
    except (OSError, IndexError, ValueError):
        return 0, 0


def reset_peak() -> bool:
    """Set this process's ``hwm`` back to its present ``rss``; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """Every limit on this process's memory, in bytes, at one moment.

    Attributes:
        mem_total: memory of the machine.
        mem_available: what the kernel says could be taken without swapping (``MemAvailable``).
        cgroup_limit: limit of the tightest memory cgroup from this process's up to the root; None if none is set.
        cgroup_path: that group's path below its mount point (this process's own group where none is limited).
        cgroup_usage: bytes charged to that group, page cache included.
        cgroup_reclaimable: page cache charged to it (active and inactive file pages), given back under pressure.
        rlimit_as: RLIMIT_AS, soft; None if unlimited.
        rlimit_data: RLIMIT_DATA, soft; None if unlimited.
        process: what this process held when the limits were read.
    """

    mem_total: int
    mem_available: int
    cgroup_limit: int | None
    cgroup_path: str | None
    cgroup_usage: int
    cgroup_reclaimable: int
    rlimit_as: int | None
    rlimit_data: int | None
    process: ProcessMemory

    def headrooms(self) -> dict[str, int]:
        """Bytes left under each limit that applies, by the limit's name in words."""
        rooms = {
            f"memory free on the machine (MemAvailable, {format_bytes(self.mem_total)} in all)": self.mem_available
        }
        if self.cgroup_limit is not None:
            name = f"the limit of the memory cgroup {self.cgroup_path} ({format_bytes(self.cgroup_limit)})"
            rooms[name] = self.cgroup_limit - max(0, self.cgroup_usage - self.cgroup_reclaimable)
        if self.rlimit_as is not None:
            rooms[f"RLIMIT_AS of the process (ulimit -v, {format_bytes(self.rlimit_as)})"] = (
                self.rlimit_as - self.process.size
            )
        if self.rlimit_data is not None:
            rooms[f"RLIMIT_DATA of the process (ulimit -d, {format_bytes(self.rlimit_data)})"] = (
                self.rlimit_data - self.process.data
            )
        return {name: max(0, room) for name, room in rooms.items()}

    @property
    def available(self) -> int:
        """Bytes this process can still take: the least room under any limit."""
        return min(self.headrooms().values())

    @property
    def limiter(self) -> str:
        """The limit that sets :attr:`available`, in words."""
        rooms = self.headrooms()
        return min(rooms, key=lambda name: rooms[name])


@dataclass(frozen=True, slots=True)
class _Group:
    limit: int | None
    name: str
    usage: int
    reclaimable: int

    @property
    def room(self) -> float:
        return float("inf") if self.limit is None else self.limit - max(0, self.usage - self.reclaimable)


def _group(folder: Path, mount: Path, version: int) -> _Group:
    stat = read_stat(folder / "memory.stat")
    if version == 2:
        # Above memory.high the kernel throttles until the process all but stands: for a budget it is a limit too.
        ceilings = [read_int(folder / "memory.max"), read_int(folder / "memory.high")]
        usage, prefix = read_int(folder / "memory.current"), ""
    else:
        ceilings = [read_int(folder / "memory.limit_in_bytes")]
        # The total_ lines count the children as the limit does.
        usage, prefix = read_int(folder / "memory.usage_in_bytes"), "total_" if "total_inactive_file" in stat else ""
    limits = [limit for limit in ceilings if limit is not None and limit < _UNLIMITED]
    reclaimable = stat.get(f"{prefix}inactive_file", 0) + stat.get(f"{prefix}active_file", 0)
    return _Group(min(limits, default=None), group_name(folder, mount), usage or 0, reclaimable)


def _rlimit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def memory_limits(root: Path = ROOT) -> MemoryLimits:
    """Every limit on this process's memory now.

    Raises:
        NarrowboatError: a system without ``/proc``.
    """
    meminfo: dict[str, int] = {}
    for line in (read_text(root / "proc/meminfo") or "").splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            meminfo[key] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    if "MemTotal" not in meminfo:
        raise NarrowboatError("cannot read /proc/meminfo: this system has no /proc (Linux is needed)")
    # Kernels before 3.14 have no MemAvailable; free memory and page cache are the nearest thing to it.
    available = meminfo.get("MemAvailable", meminfo.get("MemFree", 0) + meminfo.get("Cached", 0))
    own = own_cgroup("memory", root)
    groups = [_group(folder, own.mount, own.version) for folder in own.upwards()] if own else []
    tightest = min(groups, key=lambda group: group.room, default=None)
    return MemoryLimits(
        mem_total=meminfo["MemTotal"],
        mem_available=available,
        cgroup_limit=tightest.limit if tightest else None,
        cgroup_path=tightest.name if tightest else None,
        cgroup_usage=tightest.usage if tightest else 0,
        cgroup_reclaimable=tightest.reclaimable if tightest else 0,
        rlimit_as=_rlimit(resource.RLIMIT_AS),
        rlimit_data=_rlimit(resource.RLIMIT_DATA),
        process=process_memory(root=root),
    )


def memory_limit(root: Path = ROOT) -> int:
    """Bytes this process can still take now: ``memory_limits().available``."""
    return memory_limits(root).available
