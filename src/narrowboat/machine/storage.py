"""How fast a folder's storage gives bytes to memory, with the page cache kept out.

The probe reads as the streaming reader does: O_DIRECT ``preadv`` into page-aligned anonymous memory, by as many
threads as the depth says, each taking the next chunk of the file. Where the file system refuses O_DIRECT the
reads are buffered and the file is dropped from the page cache before each of them.

Sources: open(2) on O_DIRECT, preadv(2), posix_fadvise(2).
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from narrowboat.errors import StorageError
from narrowboat.machine.busy import busy_processes
from narrowboat.machine.cgroup_tree import ROOT, read_text
from narrowboat.machine.cpu import usable_cores
from narrowboat.machine.pagecache import cached_bytes, drop_cached
from narrowboat.quantities import format_bytes

KIB, MIB = 1 << 10, 1 << 20
CHUNKS = (256 * KIB, MIB, 4 * MIB, 16 * MIB)
DEPTHS = (1, 2, 4)
_ALIGNMENT = 4096
_SAMPLE = 256 * MIB
_QUICK_SAMPLE = 64 * MIB
_SMALLEST_SAMPLE = 16 * MIB
_ROW_SECONDS = 0.5
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_O_DIRECT = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True)
class StorageRow:
    """One measurement.

    Attributes:
        chunk: bytes per read.
        depth: reads in flight.
        busy: every usable core was kept busy by another process.
        bandwidth: bytes per second.
        chunk_latency: mean seconds from asking for a chunk to having it.
    """

    chunk: int
    depth: int
    busy: bool
    bandwidth: float
    chunk_latency: float


@dataclass(frozen=True, slots=True)
class StorageProbe:
    """What the storage under a folder can do.

    Attributes:
        folder: the folder probed.
        filesystem: type of its file system, e.g. ``"ext4"``.
        direct: O_DIRECT reads work there.
        reason: why not, in words; empty if they do.
        in_memory: the file system keeps its files in memory: its bandwidth says nothing about a disk.
        sample: bytes of the file that was read.
        cached: bytes of that file found in the page cache after all reads (0 when kept out).
        write_bandwidth: bytes per second of writing that file and making it durable.
        rows: every measurement.
        chunk: bytes per read to use.
        depth: reads in flight to use.
        bandwidth: bytes per second with those, cores idle.
        busy_bandwidth: bytes per second with those, cores busy.
    """

    folder: str
    filesystem: str
    direct: bool
    reason: str
    in_memory: bool
    sample: int
    cached: int
    write_bandwidth: float
    rows: tuple[StorageRow, ...]
    chunk: int
    depth: int
    bandwidth: float
    busy_bandwidth: float


def _refusal(error: OSError) -> str:
    if error.errno in {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}:
        return "the file system refuses O_DIRECT"
    return f"O_DIRECT fails: {error.strerror or error}"


def _read_directly(fd: int) -> None:
    with mmap.mmap(-1, _ALIGNMENT) as memory, memoryview(memory) as view:
        os.preadv(fd, [view], 0)


def direct_refusal(path: str | Path) -> str:
    """Why O_DIRECT reads do not work for ``path`` (a file, or a folder by a small file made in it); empty if they do.

    Raises:
        StorageError: the file cannot be opened, or the folder cannot be written, at all.
    """
    target = Path(path)
    if not _O_DIRECT:
        return "this system has no O_DIRECT"
    if target.is_dir():
        try:
            with tempfile.NamedTemporaryFile(dir=target, prefix=".narrowboat-probe-") as file:
                file.write(bytes(_ALIGNMENT))
                file.flush()
                os.fsync(file.fileno())
                return direct_refusal(file.name)
        except OSError as error:
            raise StorageError(f"cannot write to {target}: {error.strerror or error}") from error
    try:
        fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EACCES, errno.EPERM}:
            raise StorageError(f"cannot open {target}: {error.strerror}") from error
        return _refusal(error)
    try:
        _read_directly(fd)
    except OSError as error:
        return _refusal(error)
    finally:
        os.close(fd)
    return ""


def supports_direct(path: str | Path) -> bool:
    """Whether O_DIRECT reads work for ``path``; errors as :func:`direct_refusal`."""
    return not direct_refusal(path)


def filesystem_of(folder: str | Path, root: Path = ROOT) -> str:
    """Type of the file system under ``folder`` (``"ext4"``, ``"tmpfs"``); ``"unknown"`` where it cannot be told."""
    device = os.stat(folder).st_dev
    name, best = "unknown", -1
    resolved = str(Path(folder).resolve())
    for line in (read_text(root / "proc/self/mountinfo") or "").splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(), right.split()
        if len(before) < 5 or not after:
            continue
        if before[2] == f"{os.major(device)}:{os.minor(device)}":
            return after[0]
        # btrfs and overlays give files a device number of their own: the longest mount point decides.
        point = before[4].replace("\\040", " ")
        if len(point) > best and (resolved == point or resolved.startswith(point.rstrip("/") + "/")):
            name, best = after[0], len(point)
    return name


def _write_sample(fd: int, size: int) -> float:
    """Write ``size`` bytes that do not compress and return seconds until they are durable."""
    block = os.urandom(min(size, 8 * MIB))
    begin = time.perf_counter()
    written = 0
    while written < size:
        written += os.write(fd, memoryview(block)[: size - written])
    os.fsync(fd)
    return time.perf_counter() - begin


class _Pass:
    """Reads a file once by several threads; each read goes to the thread's own part of one mapping."""

    def __init__(self, fd: int, size: int, chunk: int, depth: int, memory: memoryview, seconds: float) -> None:
        self._fd, self._size, self._chunk, self._memory = fd, size, chunk, memory
        self._depth, self._seconds = depth, seconds
        self._lock = threading.Lock()
        self._next = 0
        self._deadline = 0.0
        self._read = 0
        self._reads = 0
        self._waited = 0.0
        self._error: OSError | None = None

    def _take(self) -> int | None:
        with self._lock:
            offset = self._next
            if offset >= self._size or self._error or time.perf_counter() > self._deadline:
                return None
            self._next = offset + self._chunk
            return offset

    def _work(self, worker: int) -> None:
        with self._memory[worker * self._chunk : (worker + 1) * self._chunk] as buffer:
            while (offset := self._take()) is not None:
                begin = time.perf_counter()
                try:
                    with buffer[: self._size - offset] as part:
                        count = os.preadv(self._fd, [part], offset)
                except OSError as error:
                    with self._lock:
                        self._error = error
                    return
                spent = time.perf_counter() - begin
                with self._lock:
                    self._read += count
                    self._reads += 1
                    self._waited += spent

    def run(self) -> tuple[float, float]:
        """Bytes per second, and mean seconds per read.

        Raises:
            OSError: a read failed.
        """
        begin = time.perf_counter()
        self._deadline = begin + self._seconds
        workers = [threading.Thread(target=self._work, args=(index,), daemon=True) for index in range(self._depth)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        spent = time.perf_counter() - begin
        if self._error is not None:
            raise self._error
        return self._read / max(spent, 1e-9), self._waited / max(self._reads, 1)


def choose(rows: tuple[StorageRow, ...]) -> tuple[int, int]:
    """Chunk and depth to use: the least bytes in flight within 10 % of the best.

    A setting's worth is the geometric mean of its idle and busy bandwidth, as a pass both waits and computes.
    """
    worth: dict[tuple[int, int], float] = {}
    for row in rows:
        worth.setdefault((row.chunk, row.depth), 1.0)
        worth[row.chunk, row.depth] *= row.bandwidth
    counts = {key: sum((row.chunk, row.depth) == key for row in rows) for key in worth}
    means = {key: value ** (1 / counts[key]) for key, value in worth.items()}
    enough = 0.9 * max(means.values())
    # Between settings with as many bytes in flight, fewer and larger reads cost fewer system calls.
    return min((key for key in means if means[key] >= enough), key=lambda key: (key[0] * key[1], key[1]))


def _measure(
    fd: int,
    size: int,
    memory: memoryview,
    settings: list[tuple[int, int]],
    seconds: float,
    direct: bool,
    step: Callable[[], None],
) -> tuple[StorageRow, ...]:
    rows: list[StorageRow] = []

    def sweep(busy: bool) -> None:
        for chunk, depth in settings:
            if not direct:
                drop_cached(fd)
            bandwidth, latency = _Pass(fd, size, chunk, depth, memory, seconds).run()
            rows.append(StorageRow(chunk, depth, busy, bandwidth, latency))
            step()

    sweep(busy=False)
    with busy_processes(usable_cores()):
        sweep(busy=True)
    return tuple(rows)


def probe_storage(
    folder: str | Path,
    *,
    quick: bool = False,
    sample: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StorageProbe:
    """Measure the storage under ``folder``. It takes a few seconds, and leaves nothing behind.

    The file read was written a moment before: below a virtual machine, the host may still hold it.

    Args:
        folder: a folder that can be written.
        quick: a smaller file and fewer settings.
        sample: bytes of the file; by default 256 MiB (64 MiB if quick), at most a quarter of the free space.
        progress: called with (measurements done, measurements in all).

    Raises:
        StorageError: no such folder, not writable, no space for 16 MiB, or a read failed.
    """
    where = Path(folder)
    try:
        free = os.statvfs(where)
        filesystem = filesystem_of(where)
    except OSError as error:
        raise StorageError(f"cannot probe {where}: {error.strerror or error}") from error
    if not where.is_dir():
        raise StorageError(f"cannot probe {where}: it is not a folder; give the folder that holds the weights")
    size = min(sample or (_QUICK_SAMPLE if quick else _SAMPLE), free.f_bavail * free.f_frsize // 4) // MIB * MIB
    if size < min(_SMALLEST_SAMPLE, sample or _SMALLEST_SAMPLE):
        raise StorageError(
            f"cannot probe {where}: only {format_bytes(free.f_bavail * free.f_frsize)} free there, "
            f"{format_bytes(4 * _SMALLEST_SAMPLE)} are needed"
        )
    chunks = [chunk for chunk in ((MIB, 4 * MIB) if quick else CHUNKS) if chunk <= size]
    settings = [(chunk, depth) for chunk in chunks for depth in ((1, 2) if quick else DEPTHS)]
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, 2 * len(settings))

    reason = direct_refusal(where)
    try:
        write_fd, name = tempfile.mkstemp(dir=where, prefix=".narrowboat-probe-")
    except OSError as error:
        raise StorageError(f"cannot write to {where}: {error.strerror or error}") from error
    read_fd = -1
    try:
        try:
            read_fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | (0 if reason else _O_DIRECT))
        finally:
            # Without a name from here on: even a kill leaves nothing in the folder.
            os.unlink(name)
        write_seconds = _write_sample(write_fd, size)
        drop_cached(write_fd)
        largest = max(chunk * depth for chunk, depth in settings)
        # Populated, as the slab of a session is: page faults belong to no read.
        with (
            mmap.mmap(
                -1, largest, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
            ) as memory,
            memoryview(memory) as view,
        ):
            rows = _measure(read_fd, size, view, settings, _ROW_SECONDS, not reason, step)
        if reason:
            drop_cached(write_fd)
        cached = cached_bytes(write_fd)
    except OSError as error:
        raise StorageError(f"the storage probe in {where} failed: {error.strerror or error}") from error
    finally:
        os.close(write_fd)
        if read_fd >= 0:
            os.close(read_fd)
    chunk, depth = choose(rows)
    chosen = {row.busy: row.bandwidth for row in rows if (row.chunk, row.depth) == (chunk, depth)}
    return StorageProbe(
        folder=str(where),
        filesystem=filesystem,
        direct=not reason,
        reason=reason,
        in_memory=filesystem in _MEMORY_FILE_SYSTEMS,
        sample=size,
        cached=cached,
        write_bandwidth=size / max(write_seconds, 1e-9),
        rows=rows,
        chunk=chunk,
        depth=depth,
        bandwidth=chosen[False],
        busy_bandwidth=chosen[True],
    )
