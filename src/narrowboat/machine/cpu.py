"""The cores this process may use, and what they can do.

Sources: sched_getaffinity(2), the cgroup cpu controller (``cpu.max``; ``cpu.cfs_quota_us``),
``/proc/cpuinfo``, ``/sys/devices/system/cpu/*/topology``.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from narrowboat.machine.cgroup_tree import ROOT, own_cgroup, read_int, read_text

# The instruction sets that change which kernel torch picks.
TELLING_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "fphp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CpuSupply:
    """What CPU this process gets.

    Attributes:
        model: the processor's name.
        online: logical cores of the machine.
        affinity: logical cores this process may run on.
        physical: physical cores among those (two hyperthreads are one).
        quota: cores' worth of time the cgroups allow; None if unlimited.
        flags: instruction sets worth telling.
    """

    model: str
    online: int
    affinity: int
    physical: int
    quota: float | None
    flags: tuple[str, ...]

    @property
    def cores(self) -> int:
        """Cores that can be kept busy: the affinity, cut to the quota rounded up; at least 1."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, math.ceil(self.quota)))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of CPU time allowed by the tightest cgroup on the way up; None if unlimited."""
    own = own_cgroup("cpu", root)
    quotas: list[float] = []
    for folder in own.upwards() if own else ():
        if own is not None and own.version == 2:
            words = (read_text(folder / "cpu.max") or "max").split()
            allowed = int(words[0]) if words and words[0].isdigit() else None
            period = int(words[1]) if len(words) > 1 and words[1].isdigit() else 100_000
        else:
            allowed = read_int(folder / "cpu.cfs_quota_us")
            period = read_int(folder / "cpu.cfs_period_us") or 100_000
        if allowed is not None and allowed > 0 and period > 0:
            quotas.append(allowed / period)
    return min(quotas, default=None)


def affinity_cores() -> frozenset[int]:
    """The logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process can keep busy (affinity and cgroup quota), at least 1."""
    quota = cpu_quota(root)
    allowed = len(affinity_cores())
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _physical(cores: Collection[int], root: Path) -> int:
    siblings = {
        read_text(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or f"alone {core}"
        for core in cores
    }
    return max(1, len(siblings))


def cpu_supply(root: Path = ROOT, cores: Collection[int] | None = None) -> CpuSupply:
    """What CPU this process gets; ``cores`` stands in for the affinity in tests."""
    allowed = affinity_cores() if cores is None else cores
    fields: dict[str, str] = {}
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip().lower(), value.strip())
    board = (read_text(root / "proc/device-tree/model") or "").rstrip("\0")
    present = set(fields.get("flags", fields.get("features", "")).split())
    return CpuSupply(
        model=fields.get("model name")
        or fields.get("hardware")
        or board
        or platform.processor()
        or platform.machine(),
        online=os.cpu_count() or len(allowed),
        affinity=len(allowed),
        physical=_physical(allowed, root),
        quota=cpu_quota(root),
        flags=tuple(flag for flag in TELLING_FLAGS if flag in present),
    )
