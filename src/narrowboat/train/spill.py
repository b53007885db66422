"""Activations on storage: written while the forward pass goes on, read back before the backward pass wants them.

One thread writes and one reads ahead. Between them they hold at most ``in_flight`` bytes: a write that would go past
it waits, a read ahead that would is left undone. A storage that is wanted back before it is written is simply given
back. Whole storages travel, not tensors: views share them, and what is written once need not be written per view.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType

import torch

from narrowboat.errors import SpillError
from narrowboat.train.spill_file import CHUNK, SpillFile, fresh_storage

log = logging.getLogger("narrowboat")
_LEAST = 1 << 20  # bytes that a folder must have room for


class Ticket:
    """A storage on its way to the spill file, or in it. Dropping the last reference releases it.

    Attributes:
        nbytes: bytes of the storage.
    """

    __slots__ = ("__weakref__", "_ahead", "_freed", "_offset", "_storage", "_write", "nbytes")

    def __init__(self, storage: torch.UntypedStorage, offset: int, freed: deque[tuple[int, int]]) -> None:
        self.nbytes = storage.nbytes()
        self._offset = offset
        self._freed: deque[tuple[int, int]] | None = freed
        self._storage: torch.UntypedStorage | None = storage  # until it is written
        self._write: Future[None] | None = None
        self._ahead: Future[torch.UntypedStorage] | torch.UntypedStorage | None = None

    @property
    def released(self) -> bool:
        """Whether its slot was given back."""
        return self._freed is None

    @property
    def _in_memory(self) -> bool:
        return self._storage is not None or self._ahead is not None

    def _release(self) -> None:
        # May run in the middle of anything, as garbage collection does: only steps that nothing can come between.
        self._freed, freed = None, self._freed
        if freed is None:
            return
        if self._write is not None:
            self._write.cancel()
        if isinstance(self._ahead, Future):
            self._ahead.cancel()
        self._storage = self._ahead = None
        freed.append((self._offset, self.nbytes))

    def __del__(self) -> None:
        self._release()


class SpillPool:
    """Storages of CPU tensors, kept in one nameless file of a folder.

    The bytes of a storage given to :meth:`write` must not change until they are written; what :meth:`read` gives may
    be that same storage. Calls may come from any thread and take turns; :meth:`release` never waits.

    Args:
        folder: where the file is; it must exist and be writable.
        in_flight: bytes of memory that the pool may hold in storages being written or read ahead. A single larger
            storage is written alone. The staging buffer (``staging_bytes``) comes on top.

    Attributes:
        seconds_waiting: how long callers have waited for the storage.

    Raises:
        SpillError: no such folder, or not writable.
        MemoryError: no memory for the staging buffer.
    """

    staging_bytes = CHUNK
    bytes_offloaded = 0  # as nothing comes from a device (``device.spill``)

    def __init__(self, folder: str | Path, *, in_flight: int) -> None:
        self._file = SpillFile(folder)
        self._in_flight = in_flight
        self._lock = threading.Lock()
        self._freed: deque[tuple[int, int]] = deque()
        self._held: list[Ticket] = []  # every ticket with bytes in memory, and some that no longer have any
        self._failure: SpillError | None = None
        self.seconds_waiting = 0.0
        # Executors keep no reference to the pool, so a pool that is dropped ends its threads and its file.
        self._writer = ThreadPoolExecutor(1, "narrowboat-spill-writer")
        self._reader = ThreadPoolExecutor(1, "narrowboat-spill-reader")
        if self._file.in_memory:
            log.warning("spill folder %s is kept in memory: spilling there saves none", self.folder)

    @property
    def folder(self) -> Path:
        """Where the file is."""
        return self._file.folder

    @property
    def direct(self) -> bool:
        """Whether the page cache is passed by."""
        return self._file.direct

    @property
    def holds_most(self) -> int:
        """Bytes of memory that the pool may hold at any moment."""
        return self._in_flight + self.staging_bytes

    @property
    def bytes_written(self) -> int:
        """Bytes given to the storage so far, the padding to whole pages included."""
        return self._file.bytes_written

    @property
    def bytes_read(self) -> int:
        """Bytes taken from the storage so far, the padding to whole pages included."""
        return self._file.bytes_read

    @property
    def file_bytes(self) -> int:
        """Bytes reserved in the folder: the most that were spilled at one time, and holes."""
        return self._file.size

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the file that tickets hold, in whole pages."""
        with self._lock:
            self._settle()
            return self._file.taken

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of storages in memory on behalf of the pool now."""
        with self._lock:
            self._settle()
            return self._holding()

    def ensure(self, nbytes: int) -> None:
        """Have so many bytes of the folder at hand, so that a disk too small is met before anything is written.

        Raises:
            SpillError: it has no such room; nothing is changed.
        """
        with self._lock:
            self._check()
            self._file.free(self._file.reserve(nbytes), nbytes)

    def start(self) -> None:
        """Start the threads now: their stacks count as data, so before a data limit is set."""
        for lane in (self._writer, self._reader):
            lane.submit(int).result()

    def expect(self, nbytes: int) -> None:
        """So many bytes will be spilled at one time in the passes that follow; here that makes no difference."""

    def rest(self) -> None:
        """Let go of a device's memory; here nothing is held of that."""

    def write(self, storage: torch.UntypedStorage) -> Ticket:
        """Queue ``storage`` to be written; waits while the pool holds too many bytes.

        Raises:
            SpillError: no space left for it, an earlier write failed (its bytes, and this storage's, are still in
                memory), not memory of the CPU, or the pool is closed.
        """
        if storage.device.type != "cpu":
            raise SpillError(f"only memory of the CPU can be spilled, not of {storage.device}: copy it first")
        with self._lock:
            self._check()
            self._make_room(storage.nbytes())
            self._check()
            ticket = Ticket(storage, self._file.reserve(storage.nbytes()), self._freed)
            if ticket.nbytes == 0:
                return ticket
            self._held.append(ticket)
            ticket._write = self._writer.submit(_write, self._file, ticket)
            return ticket

    def prefetch(self, ticket: Ticket) -> bool:
        """Begin to read ``ticket`` back, if the bytes in flight leave room; False if they do not. Never waits for I/O.

        What is not yet written stays in memory instead.

        Raises:
            SpillError: the pool is closed, or the ticket was released.
        """
        with self._lock:
            self._check_ticket(ticket)
            self._settle()
            if ticket._ahead is not None or ticket.nbytes == 0:
                return True
            ticket._ahead = ticket._storage
            if ticket._ahead is None:
                if self._holding() + ticket.nbytes > self._in_flight:
                    return False
                ticket._ahead = self._reader.submit(self._file.read, ticket._offset, ticket.nbytes)
            if not any(each is ticket for each in self._held):
                self._held.append(ticket)
            return True

    def read(self, ticket: Ticket) -> torch.UntypedStorage:
        """The bytes of ``ticket``: a storage that is the caller's alone, or the one given to :meth:`write`.

        The ticket stays valid. Bytes handed over no longer count as in flight.

        Raises:
            SpillError: the storage cannot be read, the pool is closed, or the ticket was released.
            MemoryError: no memory for them.
        """
        begin = time.perf_counter()
        with self._lock:
            self._check_ticket(ticket)
            try:
                if ticket.nbytes == 0:
                    return torch.UntypedStorage(0)
                ticket._ahead, ahead = None, ticket._ahead
                if isinstance(ahead, Future) and not ahead.cancel():
                    try:
                        return ahead.result()
                    except MemoryError:
                        ahead = None  # once more, now that its turn has come
                if isinstance(ahead, torch.UntypedStorage):
                    return ahead
                still_there = ticket._storage
                if still_there is not None:
                    return still_there
                return self._file.read(ticket._offset, ticket.nbytes)
            finally:
                self.seconds_waiting += time.perf_counter() - begin

    def release(self, ticket: Ticket) -> None:
        """Free the slot of ``ticket`` and any memory held for it; a write that has not begun is not made.

        May be called from a finalizer, twice, and after :meth:`close`. Dropping the ticket does the same.
        """
        ticket._release()
        # Whoever holds the lock, perhaps this very thread further up, frees the slot at the next call.
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def flush(self) -> None:
        """Wait until everything queued is written.

        Raises:
            SpillError: a write failed; its bytes are still in memory.
        """
        begin = time.perf_counter()
        with self._lock:
            wait([each._write for each in self._held if each._write is not None])
            self.seconds_waiting += time.perf_counter() - begin
            self._check()

    def finish(self, ticket: Ticket) -> None:
        """Wait until ``ticket`` is written.

        Raises:
            SpillError: it, or one before, could not be; the bytes are still in memory.
        """
        if (writing := ticket._write) is not None:
            wait([writing])
        with self._lock:
            self._check()

    def close(self) -> None:
        """End the threads and let the file go; whatever was only in it is gone. A second call does nothing."""
        with self._lock:
            for lane in (self._writer, self._reader):
                lane.shutdown(wait=True, cancel_futures=True)
            self._held.clear()
            self._file.close()

    def __enter__(self) -> SpillPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        if self._file.closed:
            raise SpillError(f"the spill pool in {self.folder} is closed")
        self._settle()
        if self._failure is not None:
            raise SpillError(str(self._failure)) from self._failure.__cause__

    def _check_ticket(self, ticket: Ticket) -> None:
        # A write that failed is no hindrance to reading: its bytes are still in memory.
        if self._file.closed:
            raise SpillError(f"the spill pool in {self.folder} is closed; what it held is gone")
        if ticket.released:
            raise SpillError("a spilled storage was asked for after it was released")

    def _settle(self) -> None:
        while self._freed:
            offset, nbytes = self._freed.popleft()
            self._file.free(offset, nbytes)
        for ticket in self._held:
            future = ticket._write
            if future is not None and future.done():
                ticket._write = None
                error = None if future.cancelled() else future.exception()
                if error is not None and self._failure is None:
                    self._failure = error if isinstance(error, SpillError) else _unexpected(error, self.folder)
        self._held = [ticket for ticket in self._held if ticket._in_memory or ticket._write is not None]

    def _holding(self) -> int:
        return sum(ticket.nbytes for ticket in self._held)

    def _make_room(self, nbytes: int) -> None:
        begin = time.perf_counter()
        while self._failure is None and self._held and self._holding() + nbytes > self._in_flight:
            if writing := [each._write for each in self._held if each._write is not None]:
                wait(writing[:1])
            elif not self._evict():
                break
            self._settle()
        self.seconds_waiting += time.perf_counter() - begin

    def _evict(self) -> bool:
        # Nobody but the caller would ever take what was read ahead, and the caller waits here. The last is the one
        # that is wanted last.
        for ticket in reversed(self._held):
            ticket._ahead, ahead = None, ticket._ahead
            if ahead is not None:
                if isinstance(ahead, Future) and not ahead.cancel():
                    wait([ahead])
                return True
        return False


def _write(file: SpillFile, ticket: Ticket) -> None:
    storage = ticket._storage
    if storage is not None:  # else it was released
        file.write(ticket._offset, storage.data_ptr(), ticket.nbytes)
        ticket._storage = None  # only now: after an error the bytes are still there


def _unexpected(error: BaseException, folder: Path) -> SpillError:
    failure = SpillError(f"writing in the spill folder {folder} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def measure_bandwidth(folder: str | Path, nbytes: int = 64 << 20) -> tuple[float, float]:
    """How fast the folder takes spilled bytes and gives them back, in bytes per second (writing, reading).

    It writes and reads as the pool does, one call of 4 MiB at a time, the page cache kept out; writing ends when the
    device has the bytes. Below a virtual machine the host may still hold what it was just given. Where the folder has
    less room, fewer bytes do. Nothing is left behind.

    Raises:
        SpillError: the folder cannot be used, or is full.
        MemoryError: no memory for ``nbytes`` bytes.
    """
    file = SpillFile(folder)
    try:
        offset, nbytes = _reserve_some(file, max(nbytes, 1))
        source, memory = fresh_storage(min(nbytes, CHUNK))
        memory[:] = os.urandom(len(memory))
        begin = time.perf_counter()
        for at in range(0, nbytes, CHUNK):
            file.write(offset + at, source.data_ptr(), min(CHUNK, nbytes - at))
        file.sync()
        written = time.perf_counter()
        file.read(offset, nbytes)
        return nbytes / (written - begin), nbytes / (time.perf_counter() - written)
    finally:
        file.close()


def _reserve_some(file: SpillFile, nbytes: int) -> tuple[int, int]:
    """A slot of ``nbytes`` bytes, or of fewer where there is no room for them, and its size."""
    while True:
        try:
            return file.reserve(nbytes), nbytes
        except SpillError:
            if nbytes <= _LEAST:
                raise
            nbytes = max(nbytes // 2, _LEAST)
