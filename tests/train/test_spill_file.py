"""The file of the pool: no second copy in the page cache, clear errors, and nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from narrowboat.errors import SpillError
from narrowboat.machine.pagecache import cached_bytes
from narrowboat.train.spill import SpillPool, measure_bandwidth
from narrowboat.train.spill_file import CHUNK
from narrowboat.train.spill_slots import PAGE
from spill_kit import made, raw

MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[SpillPool]:
    with SpillPool(tmp_path, in_flight=64 * MIB) as pool:
        yield pool


def test_the_page_cache_holds_no_copy(tmp_path: Path) -> None:
    with SpillPool(tmp_path, in_flight=64 * MIB) as pool:
        ticket = pool.write(made(2 * CHUNK + 77))
        pool.flush()
        pool.read(ticket)
        assert cached_bytes(pool._file._fd) == 0


def test_without_direct_io_the_page_cache_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with SpillPool(tmp_path, in_flight=64 * MIB) as pool:
        assert not pool.direct
        ticket = pool.write(made(2 * CHUNK + 77))
        pool.flush()
        assert raw(pool.read(ticket)) == raw(made(2 * CHUNK + 77))
        assert cached_bytes(pool._file._fd) == 0


def test_direct_io_refused_midway_goes_on_through_the_cache(pool: SpillPool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def refuse(fd: int, buffers: Any, offset: int) -> int:
        if fd == pool._file._direct_fd:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", refuse)
    ticket = pool.write(made(9000))
    pool.flush()
    assert not pool.direct
    assert raw(pool.read(ticket)) == raw(made(9000))


def test_short_transfers_are_finished(pool: SpillPool, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(real: Callable[..., int]) -> Callable[..., int]:
        return lambda fd, buffers, offset: real(fd, [buffers[0][:PAGE]], offset)

    monkeypatch.setattr(os, "pwritev", short(os.pwritev))
    monkeypatch.setattr(os, "preadv", short(os.preadv))
    ticket = pool.write(made(5 * PAGE + 1))
    pool.flush()
    assert raw(pool.read(ticket)) == raw(made(5 * PAGE + 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_before_anything_is_lost(small_disk: Path) -> None:
    with SpillPool(small_disk, in_flight=64 * MIB) as pool:
        half = pool.write(made(MIB // 2))
        free = r"No space left on device; free some space, or give another folder \(512 KiB are free there\)"
        with pytest.raises(SpillError, match=free):
            pool.write(made(MIB))
        other = pool.write(made(MIB // 4, 1))
        pool.flush()
        assert raw(pool.read(half)) == raw(made(MIB // 2))
        pool.release(half)
        pool.write(made(MIB // 2, 2))
        assert raw(pool.read(other)) == raw(made(MIB // 4, 1))
        with pytest.raises(SpillError, match="No space left"):
            pool.ensure(2 * MIB)
        assert raw(pool.read(other)) == raw(made(MIB // 4, 1))
    assert os.statvfs(small_disk).f_bfree == os.statvfs(small_disk).f_blocks, "nothing is left"


def test_bandwidth_is_measured_with_what_room_there_is(small_disk: Path) -> None:
    writing, reading = measure_bandwidth(small_disk)
    assert writing > 0 and reading > 0
    (small_disk / "other").write_bytes(bytes(MIB // 2))
    with pytest.raises(SpillError, match=rf"{small_disk} failed: No space left.*512 KiB are free"):
        measure_bandwidth(small_disk)


def test_a_limit_on_files_is_told(pool: SpillPool) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = pool.write(made(PAGE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    try:
        with pytest.raises(SpillError, match="ulimit -f"):
            pool.write(made(2 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    pool.flush()
    assert raw(pool.read(kept)) == raw(made(PAGE))


def test_capacity_is_reserved_at_once(tmp_path: Path) -> None:
    with SpillPool(tmp_path, in_flight=MIB) as pool:
        pool.ensure(3 * MIB)
        assert (pool.file_bytes, pool.spilled_bytes) == (3 * MIB, 0)
        pool.write(made(3 * MIB))
        assert pool.file_bytes == 3 * MIB


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpillError, match=f"{name} failed"):
        SpillPool(tmp_path / name, in_flight=MIB)


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(SpillError, match="spill folder /proc failed"):
        SpillPool("/proc", in_flight=MIB)


def test_a_folder_removed_midway_does_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with SpillPool(folder, in_flight=64 * MIB) as pool:
        first = pool.write(made(9000, 1))
        folder.rmdir()
        second = pool.write(made(9000, 2))
        pool.flush()
        assert [raw(pool.read(ticket)) for ticket in (first, second)] == [raw(made(9000, seed)) for seed in (1, 2)]


def test_the_file_has_no_name_even_where_it_must_be_made_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with SpillPool(tmp_path, in_flight=MIB) as pool:
        ticket = pool.write(made(9000))
        pool.flush()
        assert list(tmp_path.iterdir()) == []
        assert raw(pool.read(ticket)) == raw(made(9000))


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    code = """
import os, signal, sys, torch
from narrowboat.train.spill import SpillPool
pool = SpillPool(sys.argv[1], in_flight=1 << 20)
for _ in range(9):
    ticket = pool.write(torch.zeros(1 << 18).untyped_storage())
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bandwidth_is_measured_and_nothing_left(tmp_path: Path) -> None:
    writing, reading = measure_bandwidth(tmp_path, 6 * MIB + 1)
    assert writing > 0 and reading > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SpillError, match="missing"):
        measure_bandwidth(tmp_path / "missing")
