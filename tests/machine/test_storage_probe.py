"""The storage probe measures, chooses, and leaves nothing behind."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import StorageError
from narrowboat.machine import storage
from narrowboat.machine.pagecache import cached_bytes, drop_cached
from narrowboat.machine.storage import (
    StorageRow,
    choose,
    direct_refusal,
    filesystem_of,
    probe_storage,
    supports_direct,
)

MIB = 1 << 20


def test_a_probe_has_a_row_for_every_setting_and_leaves_nothing(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    probe = probe_storage(
        tmp_path, quick=True, sample=4 * MIB, progress=lambda done, total: steps.append((done, total))
    )
    assert {(row.chunk, row.depth, row.busy) for row in probe.rows} == {
        (chunk * MIB, depth, busy) for chunk in (1, 4) for depth in (1, 2) for busy in (False, True)
    }
    assert all(row.bandwidth > 0 for row in probe.rows)
    assert (probe.chunk, probe.depth) in {(row.chunk, row.depth) for row in probe.rows}
    assert probe.bandwidth > 0 and probe.busy_bandwidth > 0
    assert probe.direct == (probe.reason == "")
    assert probe.in_memory or not probe.direct or probe.cached == 0
    assert steps[-1] == (8, 8)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_refuses_direct_reads_is_probed_buffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "direct_refusal", lambda path: "the file system refuses O_DIRECT")
    probe = probe_storage(tmp_path, quick=True, sample=4 * MIB)
    assert not probe.direct
    assert probe.reason == "the file system refuses O_DIRECT"
    assert len(probe.rows) == 8
    assert list(tmp_path.iterdir()) == []


def test_a_read_error_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "direct_refusal", lambda path: "")

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError, match="Input/output error"):
        probe_storage(tmp_path, quick=True, sample=4 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, size: int) -> float:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(storage, "_write_sample", full)
    with pytest.raises(StorageError, match="No space left"):
        probe_storage(tmp_path, quick=True, sample=4 * MIB)
    assert list(tmp_path.iterdir()) == []


def test_no_such_folder_and_no_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="missing"):
        probe_storage(tmp_path / "missing")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(StorageError, match="not a folder"):
        probe_storage(file)
    with pytest.raises(StorageError, match="cannot open"):
        supports_direct(tmp_path / "missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot write"):
        probe_storage(tmp_path, sample=4 * MIB)


def test_too_little_space_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs(tmp_path)
    small = os.statvfs_result((real.f_bsize, 4096, 1000, 1000, 1000, *tuple(real)[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    with pytest.raises(StorageError, match="free there"):
        probe_storage(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_and_its_folder_agree_on_direct_reads(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(8192))
    assert supports_direct(tmp_path) == supports_direct(file)
    assert list(tmp_path.iterdir()) == [file]
    refusal = direct_refusal("/proc/self/status")
    assert "O_DIRECT" in refusal


def test_the_page_cache_can_be_watched_and_emptied(tmp_path: Path) -> None:
    if filesystem_of(tmp_path) in {"tmpfs", "ramfs"}:
        pytest.skip("files of this file system live in the page cache")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(MIB))
    assert cached_bytes(file) == MIB
    drop_cached(file)
    assert cached_bytes(file) == 0
    (tmp_path / "empty").touch()
    assert cached_bytes(tmp_path / "empty") == 0
    with pytest.raises(StorageError):
        cached_bytes(tmp_path / "missing")


settings = st.dictionaries(
    st.tuples(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.booleans()),
    st.floats(1e6, 1e10),
    min_size=1,
)


@given(settings)
def test_the_chosen_setting_is_near_the_best_and_none_as_good_is_smaller(
    speeds: dict[tuple[int, int, bool], float],
) -> None:
    rows = tuple(StorageRow(chunk, depth, busy, speed, 0.0) for (chunk, depth, busy), speed in speeds.items())
    worth = {}
    for chunk, depth in {(row.chunk, row.depth) for row in rows}:
        values = [row.bandwidth for row in rows if (row.chunk, row.depth) == (chunk, depth)]
        worth[chunk, depth] = (values[0] * values[-1]) ** 0.5
    chosen = choose(rows)
    assert worth[chosen] >= 0.899 * max(worth.values())
    for (chunk, depth), value in worth.items():
        if value >= 0.901 * max(worth.values()):
            assert chosen[0] * chosen[1] <= chunk * depth
