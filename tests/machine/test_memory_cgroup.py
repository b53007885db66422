"""A memory cgroup of one's own really limits, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from narrowboat.errors import NarrowboatError
from narrowboat.machine.cgroup import MemoryCgroup, parent_for, writable_memory_cgroup
from narrowboat.machine.cgroup_tree import OwnCgroup

MIB = 1 << 20
REFUSAL = writable_memory_cgroup()
needs_cgroup = pytest.mark.skipif(REFUSAL is not None, reason=f"no writable memory cgroup: {REFUSAL}")


def allocate(group: MemoryCgroup, size: int) -> int:
    return subprocess.run(
        [sys.executable, "-c", f"x = bytearray({size})"], preexec_fn=group.enter, check=False
    ).returncode


@needs_cgroup
def test_a_child_that_passes_the_limit_is_killed() -> None:
    with MemoryCgroup(64 * MIB) as group:
        assert allocate(group, 160 * MIB) == -9
        assert group.oom_kills() == 1


@needs_cgroup
def test_a_child_within_the_limit_runs_and_its_peak_is_seen() -> None:
    with MemoryCgroup(96 * MIB) as group:
        assert allocate(group, 32 * MIB) == 0
        assert group.oom_kills() == 0
        peak = group.peak()
        assert peak is None or 32 * MIB < peak <= 96 * MIB
        assert group.current() < 32 * MIB


@needs_cgroup
def test_a_running_process_can_be_added() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input(); x = bytearray(160 << 20)"], stdin=subprocess.PIPE)
    with MemoryCgroup(64 * MIB) as group:
        group.add(child.pid)
        child.communicate(b"\n")
        assert child.returncode == -9


@needs_cgroup
def test_the_group_is_gone_afterwards_and_removing_twice_is_harmless() -> None:
    with MemoryCgroup(64 * MIB) as group:
        assert group.folder.is_dir()
    assert not group.folder.exists()
    group.remove()


@needs_cgroup
def test_adding_no_process_is_a_named_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with MemoryCgroup(64 * MIB) as group, pytest.raises(NarrowboatError, match="cannot move process"):
        group.add(child.pid)


@needs_cgroup
def test_groups_of_processes_that_were_killed_are_swept() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with MemoryCgroup(64 * MIB) as group:
        left = group.folder.with_name(f"narrowboat-{child.pid}-0")
        left.mkdir()
        with MemoryCgroup(64 * MIB):
            assert not left.exists()
        assert group.folder.is_dir()


def own(tmp_path: Path, **files: str) -> OwnCgroup:
    folder = tmp_path / "slice" / "scope"
    folder.mkdir(parents=True)
    for name, text in files.items():
        where, _, file = name.partition("__")
        (folder if where == "scope" else folder.parent).joinpath(file.replace("_", ".", 1)).write_text(text)
    return OwnCgroup(folder, tmp_path, 2)


def test_version_2_uses_the_own_group_where_it_hands_memory_down(tmp_path: Path) -> None:
    group = own(tmp_path, scope__cgroup_subtree_control="cpu memory")
    assert parent_for(group) == group.folder


def test_version_2_without_the_memory_controller_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NarrowboatError, match="not handed down"):
        parent_for(own(tmp_path, scope__cgroup_controllers="cpu pids"))


def refuse_control(group: OwnCgroup) -> None:
    # Writing to a folder fails as the kernel's EBUSY for a group with processes does, whoever runs the test.
    (group.folder / "cgroup.subtree_control").mkdir()


def test_version_2_becomes_a_sibling_where_the_own_group_has_processes(tmp_path: Path) -> None:
    group = own(
        tmp_path, scope__cgroup_controllers="memory", scope__memory_max="max", slice__cgroup_subtree_control="memory"
    )
    refuse_control(group)
    assert parent_for(group) == group.folder.parent


def test_version_2_never_escapes_a_limit_of_the_own_group(tmp_path: Path) -> None:
    group = own(
        tmp_path, scope__cgroup_controllers="memory", scope__memory_max="1000", slice__cgroup_subtree_control="memory"
    )
    refuse_control(group)
    with pytest.raises(NarrowboatError, match="systemd-run"):
        parent_for(group)
