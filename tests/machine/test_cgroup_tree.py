"""Finding one's own control group, in trees written as the kernel shows them."""

from pathlib import Path

import pytest

from narrowboat.machine.cgroup_tree import own_cgroup, read_int, read_stat


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_version_2_group_is_found_through_the_mount(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/user.slice/app.scope",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw",
            "sys/fs/cgroup/user.slice/app.scope/memory.max": "max",
        },
    )
    own = own_cgroup("memory", tmp_path)
    assert own is not None
    assert (own.version, own.name) == (2, "/user.slice/app.scope")
    assert [folder.name for folder in own.upwards()] == ["app.scope", "user.slice", "cgroup"]


def test_version_1_controller_wins_on_a_hybrid_system(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/\n0::/unified-job",
            "proc/self/mountinfo": (
                "38 31 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
                "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
                "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
            ),
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "1000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
        },
    )
    memory, cpu = own_cgroup("memory", tmp_path), own_cgroup("cpu", tmp_path)
    assert memory is not None and cpu is not None
    assert (memory.version, memory.name) == (1, "/job")
    assert (cpu.version, cpu.name) == (1, "/")


def test_container_that_sees_only_its_own_subtree(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc",
            "proc/self/mountinfo": "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000",
        },
    )
    own = own_cgroup("memory", tmp_path)
    assert own is not None
    assert own.folder == own.mount == tmp_path / "sys/fs/cgroup/memory"


def test_membership_outside_the_mounted_subtree_falls_back_to_the_mount(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../elsewhere",
            "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
            "sys/fs/cgroup/memory.max": "max",
        },
    )
    own = own_cgroup("memory", tmp_path)
    assert own is not None
    assert own.folder == tmp_path / "sys/fs/cgroup"


@pytest.mark.parametrize("text", ["", "garbage", "4:cpu:/", "0::"])
def test_no_hierarchy_is_no_group(tmp_path: Path, text: str) -> None:
    write(tmp_path, {"proc/self/cgroup": text, "proc/self/mountinfo": "1 2 0:1 / /proc rw - proc proc rw"})
    assert own_cgroup("memory", tmp_path) is None


def test_numbers_and_stats_that_cannot_be_read_are_absent(tmp_path: Path) -> None:
    write(tmp_path, {"limit": "max", "stat": "inactive_file 12\nbroken\nname x"})
    assert read_int(tmp_path / "limit") is None
    assert read_int(tmp_path / "missing") is None
    assert read_stat(tmp_path / "stat") == {"inactive_file": 12}
