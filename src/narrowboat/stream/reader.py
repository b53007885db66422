"""The direct reader: storage straight into the slab, from a small pool of threads.

Page-aligned extents of a packed file go from the device into the place where the kernel will read them, with no page
cache and no copy. Extents at other offsets are read page-aligned into a worker's own staging buffer and copied once.
A file system that refuses O_DIRECT is read through the page cache, which is dropped behind each chunk.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from narrowboat.arena.slab import Slab
from narrowboat.checkpoint import FileStamp
from narrowboat.checkpoint.files import storage_error
from narrowboat.errors import NarrowboatError, StorageError, WeightsChangedError
from narrowboat.trace import Event, Trace

log = logging.getLogger("narrowboat")
PAGE = 4096


@dataclass(frozen=True, slots=True)
class Extent:
    """``nbytes`` bytes at ``offset`` of file number ``file``, wanted at ``target`` of the slab."""

    file: int
    offset: int
    nbytes: int
    target: int


class Landing(Protocol):
    """How the pieces of a job come to their places, where that is not a read into host memory and no more."""

    def land(self, reader: Reader, piece: Extent, worker: int) -> int:
        """Bring one piece, in a reader's thread; returns how many of its bytes the host had to copy."""

    def landed(self) -> Any:
        """Every piece has been brought; returns what the job is then ``ready`` by."""


@dataclass(eq=False, slots=True)
class Job:
    """One block on its way in.

    Attributes:
        name: for the trace.
        slab: where its extents' targets are counted in.
        extents: what to read.
        landing: who brings the pieces to their places; None for a read into the slab.
        done: all bytes are in (with a landing: brought on their way), or ``error`` is set.
        ready: what else its user has to wait for, as ``landing`` says.
        started, finished: ``perf_counter`` seconds.
    """

    name: str
    slab: Any
    extents: Sequence[Extent]
    landing: Landing | None = None
    ready: Any = None
    left: int = 0
    done: bool = False
    error: NarrowboatError | None = None
    started: float = 0.0
    finished: float = 0.0
    nbytes: int = field(default=0)


class WeightsFile:
    """An open weights file: its descriptor, whether it is read directly, and a check that it is still the same."""

    def __init__(self, path: Path, stamp: FileStamp, *, direct: bool) -> None:
        self.path = path
        self.stamp = stamp
        self.refusal = ""
        self.direct = direct
        self.fd = -1
        self._falling_back = threading.Lock()
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            if direct:
                try:
                    self.fd = os.open(path, flags | os.O_DIRECT)
                    self._try_one_page()
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
                        raise
                    self.fall_back(error.strerror or "refused")
            else:
                self.fd = os.open(path, flags)
            self.check_open_file()
        except OSError as error:
            self.close()
            raise storage_error(error, f"opening weights file {path}") from error
        except WeightsChangedError:
            self.close()
            raise

    def _try_one_page(self) -> None:
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(self.fd, [page], 0)

    def fall_back(self, reason: str) -> None:
        """Go on through the page cache, dropped behind every chunk."""
        with self._falling_back:
            if not self.direct:
                return  # another reader's thread was first
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            if self.fd >= 0:
                os.dup2(fd, self.fd, inheritable=False)
                os.close(fd)
            else:
                self.fd = fd
            self.direct, self.refusal = False, reason
        log.warning(
            "%s: direct I/O refused (%s); reading through the page cache, dropped behind each read", self.path, reason
        )

    def check_open_file(self) -> None:
        """The open file has not been altered. Raises WeightsChangedError."""
        if FileStamp.of(os.fstat(self.fd)) != self.stamp:
            raise WeightsChangedError(
                f"weights file {self.path} was altered after it was opened; results would mix two models: "
                "close the session and stream the model again"
            )

    def check_path(self) -> None:
        """The path still names the file that was opened. Raises WeightsChangedError."""
        try:
            stamp = FileStamp.of(os.stat(self.path))
        except OSError as error:
            raise WeightsChangedError(
                f"weights file {self.path} is gone ({error.strerror}); put it back, or close the session"
            ) from error
        if stamp != self.stamp:
            raise WeightsChangedError(
                f"weights file {self.path} was replaced or altered after it was opened: "
                "close the session and stream the model again to use the new weights"
            )

    def close(self) -> None:
        """Release the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Reader:
    """Reads jobs in the order they are given, ``workers`` chunks at a time.

    Args:
        files: the open weights files.
        chunk: bytes per read call, a multiple of the page.
        workers: threads.
        trace: where reads are noted.

    Attributes:
        bytes_read: bytes that have arrived, over all time.
        bytes_copied: bytes that needed a copy because they lay unaligned in the file.
        busy_seconds: time during which at least one read was under way.
    """

    def __init__(self, files: Sequence[WeightsFile], *, chunk: int, workers: int, trace: Trace) -> None:
        self._files = list(files)
        self._chunk = max(chunk // PAGE, 1) * PAGE
        self._queue: deque[tuple[Job, Extent]] = deque()
        self._cond = threading.Condition()
        self._closed = False
        self._trace = trace
        self._active = 0
        self._busy_since = 0.0
        self._threads: list[threading.Thread] = []
        self._workers = workers
        self._staging: dict[int, mmap.mmap] = {}  # by worker
        self._running = 0
        self.bytes_read = 0
        self.bytes_copied = 0
        self.busy_seconds = 0.0

    @property
    def staging_bytes(self) -> int:
        """Bytes of the workers' staging buffers if every one of them is in use."""
        return self._workers * (self._chunk + 2 * PAGE)

    @property
    def files(self) -> Sequence[WeightsFile]:
        """The open weights files."""
        return tuple(self._files)

    @property
    def chunk(self) -> int:
        """Bytes per read call."""
        return self._chunk

    @property
    def workers(self) -> int:
        """Threads."""
        return self._workers

    def submit(
        self, name: str, slab: Any, extents: Sequence[Extent], *, urgent: bool = False, landing: Landing | None = None
    ) -> Job:
        """Queue a block; ``urgent`` ones go before those that wait."""
        job = Job(name, slab, extents, landing)
        pieces = [
            (job, Extent(e.file, e.offset + at, min(self._chunk, e.nbytes - at), e.target + at))
            for e in extents
            for at in range(0, e.nbytes, self._chunk)
        ]
        job.left = len(pieces)
        job.nbytes = sum(e.nbytes for e in extents)
        with self._cond:
            if self._closed:
                raise StorageError("the reader is closed")
            if not pieces:
                job.ready, job.done = landing.landed() if landing is not None else None, True
                return job
            if not self._threads:
                self._start()
            if urgent:
                self._queue.extendleft(reversed(pieces))
            else:
                self._queue.extend(pieces)
            self._cond.notify_all()
        return job

    def wait(self, job: Job) -> None:
        """Return when ``job`` is done; raise its error if it has one."""
        if not job.done:
            with self._cond:
                while not job.done:
                    if self._closed:
                        raise StorageError("the session was closed while weights were being read")
                    self._wait_a_while()
        if job.error is not None:
            raise job.error

    def cancel(self, job: Job) -> None:
        """Give a job up: what waits of it is not read, what is under way ends. It ends with an error."""
        with self._cond:
            if job.done:
                return
            waiting = sum(queued is job for queued, _ in self._queue)
            self._queue = deque(each for each in self._queue if each[0] is not job)
            job.error = job.error or StorageError(f"reading {job.name} was given up")
            job.left -= waiting
            if job.left == 0:
                job.finished, job.done = time.perf_counter(), True
            self._cond.notify_all()

    def threads(self) -> list[int]:
        """The numbers that the system has for its threads; they begin here if they have not yet."""
        with self._cond:
            if not self._threads:
                self._start()
        return [thread.native_id for thread in self._threads if thread.native_id is not None]

    def drain(self) -> None:
        """Wait until nothing is queued or under way."""
        with self._cond:
            while (self._queue or self._active) and not self._closed:
                self._wait_a_while()

    def _wait_a_while(self) -> None:
        # An interruption between queueing and waking the workers would have both sides wait for ever.
        if self._queue and not self._active:
            self._cond.notify_all()
        self._cond.wait(1.0)

    def busy(self) -> float:
        """``busy_seconds`` up to now."""
        with self._cond:
            return self.busy_seconds + (time.perf_counter() - self._busy_since if self._active else 0.0)

    def forget_threads(self) -> None:
        """In a forked child: its threads do not exist, and a lock that one of them held is never released."""
        self._cond = threading.Condition()
        self._closed = True
        self._queue.clear()
        self._active = 0
        self._threads.clear()

    def close(self, *, wait: bool = True) -> None:
        """Stop the threads and close the files; reads under way are finished first."""
        with self._cond:
            self._closed = True
            self._queue.clear()
            self._cond.notify_all()
        for thread in self._threads if wait else ():
            thread.join()
        if wait:
            for file in self._files:
                file.close()

    def _leave(self) -> None:
        # The last thread out closes the files, where nobody waits for it.
        self._running -= 1
        if self._running == 0:
            for file in self._files:
                file.close()

    def _start(self) -> None:
        self._running = self._workers
        for worker in range(self._workers):
            thread = threading.Thread(
                target=self._work, args=(worker,), name=f"narrowboat-reader-{worker}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _work(self, worker: int) -> None:
        while True:
            with self._cond:
                while not self._queue and not self._closed:
                    self._cond.wait()
                if self._closed:
                    self._leave()
                    return
                job, piece = self._queue.popleft()
                start = time.perf_counter()
                job.started = job.started or start
                if self._active == 0:
                    self._busy_since = start
                self._active += 1
            error: NarrowboatError | None = None
            copied = 0
            try:
                if job.error is None and job.landing is not None:
                    copied = job.landing.land(self, piece, worker)
                elif job.error is None:
                    copied = self.place(piece, job.slab, worker)
            except NarrowboatError as caught:
                error = caught
            except OSError as caught:
                path = self._files[piece.file].path
                error = StorageError(
                    f"reading {path} at byte {piece.offset} failed: {caught.strerror}; "
                    "check the storage, then call again"
                )
            except BaseException as caught:  # a reader that dies silently would leave the model waiting for ever
                error = StorageError(f"reading {job.name} failed: {type(caught).__name__}: {caught}")
            end = time.perf_counter()
            self._trace.add(Event("read", job.name, start, end, piece.nbytes, worker))
            with self._cond:
                self._active -= 1
                if self._active == 0:
                    self.busy_seconds += end - self._busy_since
                self.bytes_read += piece.nbytes
                self.bytes_copied += copied
                if error is not None:
                    job.error = job.error or error
                job.left -= 1
                if job.left == 0:
                    if job.landing is not None and job.error is None:
                        try:
                            job.ready = job.landing.landed()
                        except NarrowboatError as caught:
                            job.error = caught
                    job.finished = end
                    job.done = True
                    self._cond.notify_all()
                elif not self._queue:
                    self._cond.notify_all()

    def place(self, piece: Extent, slab: Slab, worker: int) -> int:
        """Read a piece to its target in ``slab``, in the thread of ``worker``; returns how many bytes were copied."""
        direct = self._files[piece.file].direct
        if not direct or (piece.offset % PAGE == 0 and piece.target % PAGE == 0 and piece.nbytes % PAGE == 0):
            file = self._files[piece.file]
            self._read_into(file, piece.offset, slab.bytes_at(piece.target, piece.nbytes), piece.nbytes)
            self._drop_cached(file, piece)
            return 0
        staging = self._staging.get(worker) or mmap.mmap(-1, self._chunk + 2 * PAGE)
        self._staging[worker] = staging
        head = self.fetch(piece, memoryview(staging))
        source = ctypes.addressof(ctypes.c_char.from_buffer(staging)) + head
        ctypes.memmove(slab.address + piece.target, source, piece.nbytes)
        return piece.nbytes

    def fetch(self, piece: Extent, into: memoryview) -> int:
        """Read the whole pages that hold a piece into page-aligned memory; returns where in it the piece begins."""
        file = self._files[piece.file]
        head = piece.offset % PAGE
        length = -(-(head + piece.nbytes) // PAGE) * PAGE
        self._read_into(file, piece.offset - head, into[:length], head + piece.nbytes)
        self._drop_cached(file, piece)
        return head

    @staticmethod
    def _drop_cached(file: WeightsFile, piece: Extent) -> None:
        if not file.direct:
            os.posix_fadvise(file.fd, piece.offset, piece.nbytes, os.POSIX_FADV_DONTNEED)

    def _read_into(self, file: WeightsFile, offset: int, target: memoryview, needed: int) -> None:
        """Fill ``target``; at least ``needed`` bytes must exist in the file."""
        got = 0
        while got < needed:
            try:
                count = os.preadv(file.fd, [target[got:]], offset + got)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno == errno.EINVAL and file.direct:
                    file.fall_back(error.strerror or "refused")
                    continue
                raise
            got += count
            if got >= needed:
                return
            if count == 0 or offset + got >= os.fstat(file.fd).st_size:
                raise WeightsChangedError(
                    f"weights file {file.path} ends at byte {offset + got}, before the weights do: "
                    "it was truncated after it was opened"
                )
            if file.direct and got % PAGE:
                # Direct reads go on from a page boundary only.
                if count >= PAGE:
                    got -= got % PAGE
                else:
                    file.fall_back("reads shorter than a page")
