"""Cores: affinity, quota, and what the processor can do."""

import os
from pathlib import Path

import pytest

from narrowboat.machine.cpu import cpu_quota, cpu_supply, usable_cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def version_2(root: Path, files: dict[str, str]) -> Path:
    base = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    }
    return tree(root, base | {f"sys/fs/cgroup/{name}": text for name, text in files.items()})


def test_the_tightest_quota_on_the_way_up_applies(tmp_path: Path) -> None:
    root = version_2(tmp_path, {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "400000 100000"})
    assert cpu_quota(root) == 1.5


def test_version_1_quota_and_its_no_limit(tmp_path: Path) -> None:
    base = {
        "proc/self/cgroup": "1:cpu,cpuacct:/job\n",
        "proc/self/mountinfo": "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(tree(tmp_path, base)) == 0.5


def test_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(version_2(tmp_path, {"a/b/cpu.max": "max 100000"})) is None
    assert cpu_quota(tmp_path / "empty") is None


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("150000", 2), ("800000", 4)])
def test_usable_cores_are_cut_to_the_quota_rounded_up(tmp_path: Path, quota: str, cores: int) -> None:
    root = version_2(tmp_path, {"a/b/cpu.max": f"{quota} 100000"})
    assert cpu_supply(root, cores=range(4)).cores == cores


def test_hyperthreads_are_one_physical_core_and_flags_are_told(tmp_path: Path) -> None:
    files = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 2},{n % 2 + 2}\n" for n in range(4)
    }
    files["proc/cpuinfo"] = "processor\t: 0\nmodel name\t: Fast One\nflags\t\t: fpu avx2 fma sse\n\nprocessor\t: 1\n"
    supply = cpu_supply(tree(tmp_path, files), cores=range(4))
    assert (supply.affinity, supply.physical, supply.model) == (4, 2, "Fast One")
    assert supply.flags == ("avx2", "fma")


def test_an_arm_board_tells_its_name(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\n", "proc/device-tree/model": "Small Board 4\0"}
    supply = cpu_supply(tree(tmp_path, files), cores=[0])
    assert (supply.model, supply.flags) == ("Small Board 4", ("asimd",))


def test_this_machine_has_cores() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert cpu_supply().model
