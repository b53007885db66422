"""Whether this process may lock memory and run at a real-time priority.

Sources: mlock(2), sched_setscheduler(2), capabilities(7).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from narrowboat.machine.cgroup_tree import ROOT, read_int, read_text

_CAP_IPC_LOCK, _CAP_SYS_NICE = 14, 23


@dataclass(frozen=True, slots=True)
class MemoryLocking:
    """Whether memory can be locked.

    Attributes:
        works: a small mlock succeeded.
        limit: bytes that may be locked (RLIMIT_MEMLOCK, soft); None if unlimited or the process is privileged.
    """

    works: bool
    limit: int | None


@dataclass(frozen=True, slots=True)
class RealtimePriority:
    """Whether SCHED_FIFO can be had.

    Attributes:
        works: a child process was put under SCHED_FIFO.
        limit: the highest priority allowed (RLIMIT_RTPRIO, soft), or 99 for a privileged process.
        runtime_share: share of the CPU that real-time threads may take together (``sched_rt_runtime_us``).
        reason: why not; empty if it works.
    """

    works: bool
    limit: int
    runtime_share: float
    reason: str


def has_capability(number: int, root: Path = ROOT) -> bool:
    """Whether this process has capability ``number`` in its effective set."""
    for line in (read_text(root / "proc/self/status") or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _mlock_works() -> bool:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        mlock = libc.mlock
    except (OSError, AttributeError):
        return False
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        first = ctypes.c_char.from_buffer(memory)
        try:
            address, size = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(mmap.PAGESIZE)
            works = mlock(address, size) == 0
            if works:
                libc.munlock(address, size)
        finally:
            del first
    return works


def memory_locking() -> MemoryLocking:
    """Try to lock one page, and read how many bytes may be locked."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY or has_capability(_CAP_IPC_LOCK)
    return MemoryLocking(_mlock_works(), None if unlimited else soft)


def realtime_priority(root: Path = ROOT) -> RealtimePriority:
    """Try SCHED_FIFO on a child process that does nothing."""
    runtime = read_int(root / "proc/sys/kernel/sched_rt_runtime_us")
    period = read_int(root / "proc/sys/kernel/sched_rt_period_us") or 1_000_000
    share = 1.0 if runtime is None or runtime < 0 else runtime / period
    if not hasattr(os, "sched_setscheduler"):
        return RealtimePriority(False, 0, share, "this system has no sched_setscheduler")
    limit = 99 if has_capability(_CAP_SYS_NICE) else resource.getrlimit(resource.RLIMIT_RTPRIO)[0]
    reason = ""
    child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "input()"], stdin=subprocess.PIPE)
    try:
        os.sched_setscheduler(child.pid, os.SCHED_FIFO, os.sched_param(1))
    except OSError as error:
        reason = error.strerror or str(error)
    finally:
        child.kill()
        child.wait()
        if child.stdin is not None:
            child.stdin.close()
    return RealtimePriority(not reason, 99 if limit == resource.RLIM_INFINITY else limit, share, reason)
