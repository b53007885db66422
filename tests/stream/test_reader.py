"""The direct reader: the right bytes in the right place, or an error with a name; it never hangs."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from narrowboat.arena.slab import Slab
from narrowboat.checkpoint import FileStamp
from narrowboat.errors import StorageError, WeightsChangedError, WeightsNotFoundError
from narrowboat.machine.pagecache import cached_bytes, drop_cached
from narrowboat.stream.reader import PAGE, Extent, Reader, WeightsFile
from narrowboat.trace import Trace

CHUNK = 8 * PAGE
SIZE = 64 * PAGE
CONTENT = bytes((i * 31 + i // 251) % 256 for i in range(SIZE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    drop_cached(path)
    return path


class Kit:
    """A reader over one file, with a slab to read into."""

    def __init__(self, path: Path, *, direct: bool = True, workers: int = 2) -> None:
        self.path = path
        self.file = WeightsFile(path, FileStamp.of(os.stat(path)), direct=direct)
        self.trace = Trace()
        self.reader = Reader([self.file], chunk=CHUNK, workers=workers, trace=self.trace)
        self.slab = Slab(SIZE)

    def read(self, offset: int, nbytes: int, target: int = 0) -> bytes:
        """Bring the bytes in and return what then lies at ``target``."""
        self.reader.wait(self.reader.submit("block", self.slab, [Extent(0, offset, nbytes, target)]))
        return bytes(self.slab.bytes_at(target, nbytes))

    def close(self) -> None:
        self.reader.close()
        self.file.close()


@pytest.fixture
def open_kit(path: Path) -> Iterator[Callable[..., Kit]]:
    made: list[Kit] = []

    def make(**options: Any) -> Kit:
        made.append(Kit(path, **options))
        return made[-1]

    yield make
    for kit in made:
        kit.close()


def replace_preadv(monkeypatch: pytest.MonkeyPatch, instead: Callable[[Any, int, Any, int], int]) -> list[int]:
    """Call ``instead(real preadv, fd, buffers, offset)`` for every read; returns the offsets asked for."""
    real, asked = os.preadv, []

    def preadv(fd: int, buffers: Any, offset: int, *flags: int) -> int:
        asked.append(offset)
        return instead(real, fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    return asked


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("offset", "nbytes", "target"),
    [
        (0, SIZE, 0),
        (PAGE, 3 * PAGE, 5 * PAGE),
        (0, CHUNK + PAGE, PAGE),
        (100, 1, 64),
        (4095, 4098, 128),
        (7, CHUNK * 3 + 5, 64),
    ],
)
def test_any_extent_arrives_where_it_is_wanted(
    open_kit: Callable[..., Kit], direct: bool, offset: int, nbytes: int, target: int
) -> None:
    kit = open_kit(direct=direct)
    assert kit.read(offset, nbytes, target) == CONTENT[offset : offset + nbytes]
    assert kit.reader.bytes_read == nbytes


def test_only_the_wanted_bytes_of_the_slab_are_written(open_kit: Callable[..., Kit]) -> None:
    kit = open_kit()
    ctypes.memset(kit.slab.address, 0xAB, SIZE)
    kit.read(100, 5000, 64)
    assert bytes(kit.slab.bytes_at(0, 64)) == b"\xab" * 64
    assert set(kit.slab.bytes_at(64 + 5000, SIZE - 64 - 5000)) == {0xAB}


def test_page_aligned_extents_are_not_copied_and_others_are_counted(open_kit: Callable[..., Kit]) -> None:
    kit = open_kit()
    if not kit.file.direct:
        pytest.skip("this file system refuses direct I/O")
    kit.read(0, 4 * PAGE)
    assert kit.reader.bytes_copied == 0
    kit.read(64, 3000, 64)
    assert kit.reader.bytes_copied == 3000


def test_direct_reads_stay_out_of_the_page_cache_and_buffered_ones_leave_it(open_kit: Callable[..., Kit]) -> None:
    for direct in (True, False):
        kit = open_kit(direct=direct)
        if direct and not kit.file.direct:
            continue
        kit.read(0, SIZE)
        assert cached_bytes(kit.path) <= 32 * PAGE  # of 64: read-ahead of the last chunk may linger


def test_a_block_of_no_bytes_is_done_at_once(open_kit: Callable[..., Kit]) -> None:
    kit = open_kit()
    job = kit.reader.submit("empty", kit.slab, [])
    assert job.done
    kit.reader.wait(job)


@pytest.mark.parametrize("piece", [PAGE, 3 * PAGE, 5000, 700])
@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_are_gone_on_with(
    open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch, piece: int, direct: bool
) -> None:
    kit = open_kit(direct=direct)
    replace_preadv(
        monkeypatch,
        lambda real, fd, buffers, offset: (
            real(fd, [memoryview(buffers[0])[: -(-piece // PAGE) * PAGE]], offset)
            if piece % PAGE == 0
            else min(real(fd, buffers, offset), piece)
        ),
    )
    assert kit.read(0, 6 * PAGE, PAGE) == CONTENT[: 6 * PAGE]
    assert kit.read(33, 9000, 64) == CONTENT[33:9033]


def test_an_interrupted_read_is_tried_again(open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch) -> None:
    kit = open_kit()
    left = [3]

    def interrupted(real: Any, fd: int, buffers: Any, offset: int) -> int:
        if left[0]:
            left[0] -= 1
            raise InterruptedError(errno.EINTR, "Interrupted system call")
        return real(fd, buffers, offset)

    replace_preadv(monkeypatch, interrupted)
    assert kit.read(0, 2 * PAGE) == CONTENT[: 2 * PAGE]
    assert left == [0]


def test_an_io_error_names_file_and_place_and_the_reader_goes_on(
    open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = open_kit()

    def failing(real: Any, fd: int, buffers: Any, offset: int) -> int:
        if offset == CHUNK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    with monkeypatch.context() as patch:
        replace_preadv(patch, failing)
        with pytest.raises(StorageError, match=f"{kit.path} at byte {CHUNK}.*Input/output error"):
            kit.read(0, 3 * CHUNK)
        assert kit.read(2 * CHUNK, CHUNK) == CONTENT[2 * CHUNK : 3 * CHUNK]
    assert kit.read(0, 3 * CHUNK) == CONTENT[: 3 * CHUNK]


def test_an_unforeseen_error_in_a_reader_thread_reaches_the_one_who_waits(
    open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = open_kit()

    def failing(real: Any, fd: int, buffers: Any, offset: int) -> int:
        raise ZeroDivisionError("unforeseen")

    with monkeypatch.context() as patch:
        replace_preadv(patch, failing)
        with pytest.raises(StorageError, match="unforeseen"):
            kit.read(0, PAGE)
    assert kit.read(0, PAGE) == CONTENT[:PAGE]


def test_a_refusal_in_the_middle_falls_back_to_buffered_reads_with_one_warning(
    open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kit = open_kit(workers=4)
    if not kit.file.direct:
        pytest.skip("this file system refuses direct I/O")

    def refusing(real: Any, fd: int, buffers: Any, offset: int) -> int:
        if kit.file.direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, buffers, offset)

    replace_preadv(monkeypatch, refusing)
    with caplog.at_level(logging.WARNING, "narrowboat"):
        assert kit.read(0, SIZE) == CONTENT
        assert kit.read(50, 7000, 64) == CONTENT[50:7050]
    assert [record.message for record in caplog.records if "direct I/O refused" in record.message] == [
        caplog.records[0].message
    ]
    assert not kit.file.direct
    assert kit.file.refusal == "Invalid argument"
    assert not os.get_inheritable(kit.file.fd)


def test_a_file_system_without_direct_io_is_read_buffered(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", refusing)
    with caplog.at_level(logging.WARNING, "narrowboat"):
        kit = Kit(path)
    assert not kit.file.direct
    assert len(caplog.records) == 1
    assert kit.read(3, 5 * PAGE, 64) == CONTENT[3 : 3 + 5 * PAGE]
    kit.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("left", [0, 2 * PAGE, 2 * PAGE + 100])
def test_a_truncated_file_is_noticed_at_the_byte_where_it_ends(
    open_kit: Callable[..., Kit], direct: bool, left: int
) -> None:
    kit = open_kit(direct=direct)
    os.truncate(kit.path, left)
    with pytest.raises(WeightsChangedError, match=f"ends at byte {left},"):
        kit.read(0, 4 * PAGE)
    with pytest.raises(WeightsChangedError):
        kit.file.check_open_file()
    assert kit.file.direct == (direct and kit.file.refusal == "")


def test_a_replaced_file_is_noticed_by_its_path_and_an_altered_one_by_its_descriptor(
    open_kit: Callable[..., Kit], tmp_path: Path
) -> None:
    kit = open_kit()
    kit.file.check_path()
    (tmp_path / "other").write_bytes(CONTENT[::-1])
    os.replace(tmp_path / "other", kit.path)
    with pytest.raises(WeightsChangedError, match="replaced or altered"):
        kit.file.check_path()
    assert kit.read(0, PAGE) == CONTENT[:PAGE], "the descriptor still has the file that was opened"
    kit.path.unlink()
    with pytest.raises(WeightsChangedError, match="gone"):
        kit.file.check_path()


def test_opening_what_is_not_the_stamped_file_is_refused_and_leaks_no_descriptor(path: Path, tmp_path: Path) -> None:
    stamp = FileStamp.of(os.stat(path))
    (tmp_path / "other").write_bytes(b"x" * SIZE)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WeightsChangedError):
        WeightsFile(tmp_path / "other", stamp, direct=True)
    with pytest.raises(WeightsNotFoundError):
        WeightsFile(tmp_path / "missing", stamp, direct=True)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_io_error_on_opening_is_the_storages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(real: Any, fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    replace_preadv(monkeypatch, failing)
    with pytest.raises(StorageError, match=f"{path}: Input/output error"):
        WeightsFile(path, FileStamp.of(os.stat(path)), direct=True)


class Gate:
    """Reads wait at the gate until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.asked = replace_preadv(monkeypatch, self._read)

    def _read(self, real: Any, fd: int, buffers: Any, offset: int) -> int:
        self.reached.set()
        assert self.open.wait(30)
        return real(fd, buffers, offset)


def test_blocks_are_read_in_the_order_given_but_urgent_ones_go_first(
    open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = open_kit(workers=1)
    gate = Gate(monkeypatch)
    jobs = [kit.reader.submit("under way", kit.slab, [Extent(0, 0, CHUNK, 0)])]
    assert gate.reached.wait(30)
    jobs.append(kit.reader.submit("first", kit.slab, [Extent(0, CHUNK, 2 * CHUNK, CHUNK)]))
    jobs.append(kit.reader.submit("second", kit.slab, [Extent(0, 3 * CHUNK, CHUNK, 3 * CHUNK)]))
    jobs.append(kit.reader.submit("urgent", kit.slab, [Extent(0, 4 * CHUNK, 2 * CHUNK, 4 * CHUNK)], urgent=True))
    gate.open.set()
    for job in jobs:
        kit.reader.wait(job)
    assert [offset // CHUNK for offset in gate.asked] == [0, 4, 5, 1, 2, 3]
    assert [event.name for event in kit.trace.events()] == [
        "under way", "urgent", "urgent", "first", "first", "second",
    ]  # fmt: skip
    assert bytes(kit.slab.bytes_at(0, 6 * CHUNK)) == CONTENT[: 6 * CHUNK]


def test_draining_waits_for_everything(open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch) -> None:
    kit = open_kit()
    gate = Gate(monkeypatch)
    job = kit.reader.submit("block", kit.slab, [Extent(0, 0, 4 * CHUNK, 0)])
    threading.Timer(0.05, gate.open.set).start()
    kit.reader.drain()
    assert job.done


def test_closing_while_somebody_waits_ends_the_wait_with_an_error(
    open_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = open_kit(workers=1)
    gate = Gate(monkeypatch)
    kit.reader.submit("under way", kit.slab, [Extent(0, 0, CHUNK, 0)])
    queued = kit.reader.submit("queued", kit.slab, [Extent(0, CHUNK, CHUNK, CHUNK)])
    assert gate.reached.wait(30)
    met: list[BaseException] = []

    def wait() -> None:
        try:
            kit.reader.wait(queued)
        except StorageError as error:
            met.append(error)

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    closing = threading.Thread(target=kit.reader.close, daemon=True)
    closing.start()
    waiting.join(30)
    gate.open.set()
    closing.join(30)
    assert not waiting.is_alive()
    assert not closing.is_alive()
    assert "closed" in str(met[0])
    with pytest.raises(StorageError, match="closed"):
        kit.reader.submit("late", kit.slab, [Extent(0, 0, PAGE, 0)])


def test_busy_time_counts_overlapping_reads_once(open_kit: Callable[..., Kit]) -> None:
    kit = open_kit(workers=4)
    kit.read(0, SIZE)
    kit.reader.drain()
    events = kit.trace.events()
    span = max(event.end for event in events) - min(event.start for event in events)
    assert 0 < kit.reader.busy() <= span + 1e-3
    assert sum(event.nbytes for event in events) == SIZE


def test_a_wakeup_lost_to_an_interruption_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C can strike after a read is queued and before the workers are told."""
    data = os.urandom(4 * PAGE)
    (tmp_path / "data").write_bytes(data)
    file = WeightsFile(tmp_path / "data", FileStamp.of(os.stat(tmp_path / "data")), direct=False)
    reader = Reader([file], chunk=PAGE, workers=1, trace=Trace())
    slab = Slab(4 * PAGE)
    reader.wait(reader.submit("first", slab, [Extent(0, 0, PAGE, 0)]))  # the worker is up, and waits
    with monkeypatch.context() as silent:
        silent.setattr(reader._cond, "notify_all", lambda: None)
        job = reader.submit("second", slab, [Extent(0, PAGE, PAGE, PAGE)])
    waiting = threading.Thread(target=reader.drain, daemon=True)
    waiting.start()
    waiting.join(10)
    assert not waiting.is_alive()
    assert job.done
    assert bytes(slab.bytes_at(0, 2 * PAGE)) == data[: 2 * PAGE]
    reader.close()
    slab.close()
