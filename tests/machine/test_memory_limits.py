"""The limits that really apply, and the memory a process uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import NarrowboatError
from narrowboat.machine.memory import (
    MemoryLimits,
    ProcessMemory,
    memory_limits,
    parse_status,
    process_memory,
    reset_peak,
)

MIB = 1 << 20
STATUS = (
    "Name:\tx\nVmSize:\t900 kB\nVmHWM:\t700 kB\nVmRSS:\t600 kB\n"
    "RssAnon:\t500 kB\nRssFile:\t60 kB\nRssShmem:\t40 kB\nVmData:\t550 kB\n"
)
MEMINFO = "MemTotal: 1048576 kB\nMemFree: 100 kB\nMemAvailable: 524288 kB\nCached: 50 kB\nHugePages_Total: 0\n"
NO_MEMORY = ProcessMemory(rss=0, anon=0, file=0, shmem=0, hwm=0, size=0, data=0)


def tree(root: Path, cgroup: str, mountinfo: str, files: dict[str, str], meminfo: str = MEMINFO) -> Path:
    proc = {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": mountinfo,
        "proc/self/status": STATUS,
        "proc/meminfo": meminfo,
    }
    for name, text in (proc | files).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def version_2(root: Path, files: dict[str, str]) -> Path:
    mount = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"
    return tree(root, "0::/a/b\n", mount, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def test_status_is_read_in_bytes() -> None:
    memory = parse_status(STATUS)
    assert (memory.rss, memory.anon, memory.file, memory.shmem) == (600 << 10, 500 << 10, 60 << 10, 40 << 10)
    assert (memory.hwm, memory.size, memory.data) == (700 << 10, 900 << 10, 550 << 10)


@given(st.text())
def test_any_text_of_status_is_read_without_an_error(text: str) -> None:
    assert parse_status(text).rss >= 0


def test_a_parents_tighter_limit_applies(tmp_path: Path) -> None:
    limits = memory_limits(
        version_2(
            tmp_path,
            {
                "a/b/memory.max": str(400 * MIB),
                "a/b/memory.current": str(100 * MIB),
                "a/memory.max": str(300 * MIB),
                "a/memory.current": str(200 * MIB),
                "a/memory.stat": f"anon 1\ninactive_file {30 * MIB}\nactive_file {20 * MIB}\n",
            },
        )
    )
    assert (limits.cgroup_limit, limits.cgroup_path) == (300 * MIB, "/a")
    assert limits.cgroup_reclaimable == 50 * MIB
    assert limits.available == 150 * MIB
    assert "/a" in limits.limiter


def test_reclaimable_page_cache_does_not_count_as_used(tmp_path: Path) -> None:
    files = {"a/b/memory.max": str(100 * MIB), "a/b/memory.current": str(90 * MIB)}
    files["a/b/memory.stat"] = f"inactive_file {80 * MIB}\nactive_file 0\n"
    assert memory_limits(version_2(tmp_path, files)).available == 90 * MIB


def test_memory_high_is_a_limit(tmp_path: Path) -> None:
    files = {"a/b/memory.max": "max", "a/b/memory.high": str(64 * MIB), "a/b/memory.current": "0"}
    assert memory_limits(version_2(tmp_path, files)).cgroup_limit == 64 * MIB


def test_version_1_counts_the_children_and_knows_its_no_limit(tmp_path: Path) -> None:
    mount = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    base = "sys/fs/cgroup/memory"
    limits = memory_limits(
        tree(
            tmp_path,
            "4:memory:/job/step\n",
            mount,
            {
                f"{base}/job/step/memory.limit_in_bytes": "9223372036854771712",
                f"{base}/job/step/memory.usage_in_bytes": "10",
                f"{base}/job/memory.limit_in_bytes": str(200 * MIB),
                f"{base}/job/memory.usage_in_bytes": str(150 * MIB),
                f"{base}/job/memory.stat": (
                    f"inactive_file 1\ntotal_inactive_file {40 * MIB}\ntotal_active_file {10 * MIB}\n"
                ),
            },
        )
    )
    assert (limits.cgroup_path, limits.available) == ("/job", 100 * MIB)


def test_without_a_cgroup_limit_the_machine_decides(tmp_path: Path) -> None:
    limits = memory_limits(version_2(tmp_path, {"a/b/memory.max": "max"}))
    assert limits.cgroup_limit is None
    assert limits.available == 512 * MIB
    assert "MemAvailable" in limits.limiter


def test_an_old_kernel_without_mem_available(tmp_path: Path) -> None:
    root = tree(tmp_path, "", "", {}, "MemTotal: 1000 kB\nMemFree: 100 kB\nCached: 50 kB\n")
    assert memory_limits(root).mem_available == 150 << 10


def test_a_system_without_proc_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(NarrowboatError, match="Linux"):
        memory_limits(tmp_path)
    with pytest.raises(NarrowboatError, match="ended"):
        process_memory(123, tmp_path)


sizes = st.integers(0, 1 << 45)


@given(sizes, st.none() | sizes, sizes, sizes, st.none() | sizes, st.none() | sizes)
def test_available_is_the_least_room_and_never_negative(
    free: int, limit: int | None, usage: int, cache: int, rlimit_as: int | None, rlimit_data: int | None
) -> None:
    limits = MemoryLimits(free, free, limit, "/g", usage, cache, rlimit_as, rlimit_data, NO_MEMORY)
    assert 0 <= limits.available <= free
    assert limits.headrooms()[limits.limiter] == limits.available
    for bound in (rlimit_as, rlimit_data):
        assert bound is None or limits.available <= bound
    if limit is not None:
        assert limits.available <= limit


def test_a_real_process_is_measured_from_outside() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "x = bytearray(64 << 20); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    memory = process_memory(child.pid)
    child.communicate(b"\n")
    assert memory.anon > 64 << 20
    assert memory.hwm >= memory.rss
    assert process_memory(os.getpid()).rss > 0


def test_the_peak_can_be_reset() -> None:
    script = (
        "from narrowboat.machine.memory import process_memory, reset_peak\n"
        "x = bytearray(64 << 20); del x\n"
        "before = process_memory().hwm\n"
        "print(reset_peak(), before - process_memory().hwm > 32 << 20)\n"
    )
    if not reset_peak():
        pytest.skip("the kernel does not let this process write /proc/self/clear_refs")
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        == "True True\n"
    )


def test_a_real_rlimit_is_seen() -> None:
    script = (
        "import resource\n"
        "from narrowboat.machine.memory import memory_limits\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20))\n"
        "limits = memory_limits()\n"
        "assert limits.rlimit_data == 256 << 20 and limits.available < 256 << 20\n"
        "assert limits.available >= min(limits.mem_available, 64 << 20)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
