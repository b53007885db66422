"""Look at this machine, and say in sentences what it offers, what it lacks, and what each absence means."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from narrowboat.machine.cgroup import writable_memory_cgroup
from narrowboat.machine.cpu import CpuSupply, cpu_supply
from narrowboat.machine.cuda import CudaSupport, cuda_support
from narrowboat.machine.hugepages import HugePages, huge_pages
from narrowboat.machine.malloc import allocator_name
from narrowboat.machine.memory import MemoryLimits, memory_limits
from narrowboat.machine.openmp import (
    DEFAULT_SPINCOUNT,
    OpenMPChoice,
    OpenMPStatus,
    load_choice,
    openmp_status,
    save_choice,
)
from narrowboat.machine.openmp_measure import OpenMPMeasurement, measure_openmp_policies
from narrowboat.machine.realtime import MemoryLocking, RealtimePriority, memory_locking, realtime_priority
from narrowboat.machine.storage import StorageProbe, probe_storage
from narrowboat.machine.storage_choice import save_storage_choice
from narrowboat.quantities import format_bytes

State = Literal["ok", "warn", "absent"]
_SLOW_STORAGE = 100e6


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        title: what, in two or three words.
        state: ``"ok"``; ``"warn"`` (speed or a promise is at stake); ``"absent"`` (not to be had here).
        meaning: what was found and what it means.
        advice: what to do; empty if nothing needs doing.
    """

    title: str
    state: State
    meaning: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything :func:`diagnose` found out."""

    system: str
    python: str
    torch: str | None
    cpu: CpuSupply
    memory: MemoryLimits
    memory_cgroup_refusal: str | None
    storage: StorageProbe
    huge_pages: HugePages
    locking: MemoryLocking
    realtime: RealtimePriority
    cuda: CudaSupport
    allocator: str
    openmp: OpenMPStatus
    openmp_choice: OpenMPChoice | None
    openmp_measurement: OpenMPMeasurement | None
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain dicts, lists, numbers and strings, keyed by the fields' names; bytes and seconds."""
        document = asdict(self)
        document["cpu"]["cores"] = self.cpu.cores
        document["memory"] |= {"available": self.memory.available, "limiter": self.memory.limiter}
        return document


def cpu_finding(cpu: CpuSupply) -> Finding:
    """Cores, and whether a quota stops the process now and then."""
    flags = f"; {', '.join(cpu.flags)}" if cpu.flags else ""
    meaning = f"{cpu.model}: {cpu.cores} usable of {cpu.online} logical cores ({cpu.physical} physical){flags}"
    if cpu.quota is not None and cpu.quota < cpu.affinity:
        return Finding(
            "cores",
            "warn",
            f"{meaning}; a cgroup quota of {cpu.quota:g} cores stops the process whenever its share is used up",
            "set OMP_NUM_THREADS to the quota rounded down, so that all threads are not stopped inside a pass",
        )
    return Finding("cores", "ok", meaning)


def memory_finding(memory: MemoryLimits) -> Finding:
    """What can be taken, and which limit says so."""
    meaning = f"{format_bytes(memory.available)} can be taken, limited by {memory.limiter}"
    return Finding("memory", "ok", meaning)


def cgroup_finding(refusal: str | None) -> Finding:
    """Whether a budget can be proved under a limit the kernel enforces."""
    if refusal is None:
        return Finding("memory cgroup", "ok", "a budget can be proved under a limit that the kernel enforces")
    return Finding(
        "memory cgroup",
        "absent",
        f"{refusal}; budgets hold all the same, but demo and benchmarks cannot show it under a limit "
        "the kernel enforces",
        "run them as root, in a container with a writable cgroup, or under `systemd-run --user --scope`",
    )


def storage_finding(storage: StorageProbe) -> Finding:
    """How fast weights come in, and whether they stay out of the page cache."""
    meaning = (
        f"{storage.folder} ({storage.filesystem}) gives {format_bytes(storage.bandwidth)}/s with the cores idle and "
        f"{format_bytes(storage.busy_bandwidth)}/s with the cores busy, "
        f"{storage.depth} x {format_bytes(storage.chunk)} in flight"
    )
    if storage.in_memory:
        return Finding(
            "storage",
            "warn",
            f"{meaning}; this file system keeps files in memory, so weights there take memory beside the budget",
            "keep the weights on a disk, and give doctor that folder",
        )
    if not storage.direct:
        return Finding(
            "storage",
            "warn",
            f"{meaning}; {storage.reason}, so reads go through the page cache, which is dropped behind them: slower, "
            "and the cache grows by what is in flight",
            "keep the weights on a local ext4, xfs or btrfs file system",
        )
    if storage.bandwidth < _SLOW_STORAGE:
        return Finding(
            "storage",
            "warn",
            f"{meaning}; O_DIRECT works, but a pass that must read much will wait for the storage",
            "give a larger budget (more weights stay in memory), or a faster disk",
        )
    return Finding("storage", "ok", f"{meaning}; O_DIRECT works, so weights leave nothing in the page cache")


def huge_pages_finding(pages: HugePages) -> Finding:
    """Whether the slab gets huge pages."""
    if pages.on_advice:
        return Finding(
            "huge pages",
            "ok",
            f"mode {pages.mode}: the slab of weights gets {format_bytes(pages.size)} pages on advice",
        )
    found = "the kernel has none" if pages.mode == "absent" else "switched off (mode never)"
    return Finding(
        "huge pages",
        "absent",
        f"{found}: large weights cost more address translations, a few per cent of speed in matrix products",
        "" if pages.mode == "absent" else "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
    )


def locking_finding(locking: MemoryLocking) -> Finding:
    """Whether weights can be kept from being swapped out."""
    advice = "raise `ulimit -l` (memlock in /etc/security/limits.conf), or grant CAP_IPC_LOCK"
    if not locking.works:
        return Finding(
            "memory locking",
            "absent",
            "the system may swap resident weights out under pressure: a pass can stall",
            advice,
        )
    if locking.limit is None:
        return Finding("memory locking", "ok", "any amount can be locked: resident weights cannot be swapped out")
    return Finding(
        "memory locking",
        "warn",
        f"only {format_bytes(locking.limit)} can be locked: a larger slab stays unlocked and may be swapped out "
        "under pressure",
        advice,
    )


def realtime_finding(realtime: RealtimePriority) -> Finding:
    """Whether deadlines can be kept against other processes."""
    if realtime.works:
        return Finding(
            "real-time priority",
            "ok",
            f"SCHED_FIFO up to priority {realtime.limit}; "
            f"real-time threads may take {realtime.runtime_share:.0%} of the time",
        )
    return Finding(
        "real-time priority",
        "absent",
        f"SCHED_FIFO is refused ({realtime.reason}): other processes can delay a job, so deadlines are "
        "met only as far as measured, not guaranteed",
        "raise `ulimit -r` (rtprio in /etc/security/limits.conf), or grant CAP_SYS_NICE",
    )


def cuda_finding(cuda: CudaSupport) -> Finding:
    """Which devices there are, and whether models can run on them in a budget."""
    if not cuda.devices:
        return Finding("CUDA", "absent", f"{cuda.reason}: models run on the CPU; device='cuda' is refused")
    names = ", ".join(
        f"{device.name} ({format_bytes(device.free)} of {format_bytes(device.total)} free"
        f"{'; shares memory with the host' if device.integrated else ''})"
        for device in cuda.devices
    )
    driver = f"driver for CUDA {cuda.driver}" if cuda.driver else "a driver of unknown version"
    bindings = f"bindings {cuda.bindings}" if cuda.bindings else "no bindings for Python"
    meaning = f"{names}; {driver}, {bindings}"
    if not cuda.bindings:
        return Finding(
            "CUDA",
            "warn",
            f"{meaning}: device='cuda' is refused, as torch alone cannot map memory behind addresses",
            "pip install 'narrowboat[cuda]'",
        )
    unable = [device.name for device in cuda.devices if device.virtual_memory is False and not device.integrated]
    if unable:
        return Finding(
            "CUDA",
            "warn",
            f"{meaning}; no virtual memory management on {', '.join(unable)}: device='cuda' is refused there",
            "update the NVIDIA driver",
        )
    return Finding("CUDA", "ok", meaning)


def allocator_finding(allocator: str) -> Finding:
    """Whether activation memory can be kept near what tensors hold."""
    if allocator == "glibc":
        return Finding("allocator", "ok", "glibc malloc: the policy that keeps activation memory honest can be set")
    return Finding(
        "allocator",
        "warn",
        f"{allocator} malloc: its policy cannot be set, so a process may hold more memory than its tensors need",
        "compare the peak reported by a session with the budget, and leave room",
    )


def openmp_finding(status: OpenMPStatus, choice: OpenMPChoice | None) -> Finding:
    """The wait policy, and what to set in one's own programs."""
    if status.risky:
        return Finding("OpenMP", "warn", status.advice, f"export GOMP_SPINCOUNT={DEFAULT_SPINCOUNT}")
    waits = {
        "default": "threads spin long at barriers, which this machine's spare cores allow",
        "active": "threads spin at barriers",
        "passive": "threads sleep at barriers",
    }.get(status.policy, f"threads spin {status.policy} rounds at barriers, then sleep")
    variables = choice.environment() if choice else {"GOMP_SPINCOUNT": str(DEFAULT_SPINCOUNT)}
    settings = " ".join(f"{name}={value}" for name, value in variables.items())
    if choice is None:
        told = "not measured here yet"
    elif choice.policy == status.policy:
        told = "measured to be the best here"
    else:
        told = "another was measured to be better; the next command uses it"
    return Finding(
        "OpenMP",
        "ok",
        f"{status.threads} threads; {waits} ({told})",
        f"the command line sets this for itself; for your own program: export {settings}" if settings else "",
    )


def _torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def diagnose(
    folder: str | Path = ".",
    *,
    quick: bool = False,
    measure_openmp: bool = True,
    remember: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Look at everything. Half a minute, or a few seconds with ``quick`` and without ``measure_openmp``.

    Args:
        folder: the folder whose storage is probed: where the weights are.
        quick: a shorter storage probe.
        measure_openmp: measure the OpenMP wait policy and thread count, too.
        remember: keep the measured choice for later processes.
        progress: called with what is being done, in words.

    Raises:
        StorageError: the folder cannot be probed.
        NarrowboatError: the OpenMP measurement failed, or this is not Linux.
    """
    tell = progress or (lambda _: None)
    tell("reading the limits")
    cpu, memory, pages = cpu_supply(), memory_limits(), huge_pages()
    refusal, locking, realtime, allocator = (
        writable_memory_cgroup(),
        memory_locking(),
        realtime_priority(),
        allocator_name(),
    )
    tell(f"probing the storage of {folder}")
    storage = probe_storage(
        folder, quick=quick, progress=lambda done, total: tell(f"probing the storage of {folder}: {done} of {total}")
    )
    measurement, choice = None, load_choice()
    unsaved = ""
    if remember:
        try:
            save_storage_choice(folder, storage)
        except OSError as error:
            unsaved = f"; it could not be kept for later: {error}"
    if measure_openmp:
        measurement = measure_openmp_policies(progress=lambda what: tell(f"measuring OpenMP: {what}"))
        choice = measurement.choice
        if remember:
            try:
                save_choice(choice)
            except OSError as error:
                unsaved = f"; it could not be kept for later: {error}"
    tell("asking for CUDA")
    cuda = cuda_support()
    status = openmp_status()
    openmp = openmp_finding(status, choice)
    if unsaved:
        openmp = Finding(
            openmp.title, "warn", openmp.meaning + unsaved, "set NARROWBOAT_CACHE to a folder that can be written"
        )
    return Diagnosis(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=_torch_version(),
        cpu=cpu,
        memory=memory,
        memory_cgroup_refusal=refusal,
        storage=storage,
        huge_pages=pages,
        locking=locking,
        realtime=realtime,
        cuda=cuda,
        allocator=allocator,
        openmp=status,
        openmp_choice=choice,
        openmp_measurement=measurement,
        findings=(
            cpu_finding(cpu),
            memory_finding(memory),
            storage_finding(storage),
            openmp,
            allocator_finding(allocator),
            huge_pages_finding(pages),
            locking_finding(locking),
            realtime_finding(realtime),
            cgroup_finding(refusal),
            cuda_finding(cuda),
        ),
    )
