"""A file of records in two generations: what is on disk is always that of the last commit.

Each record has two slots. A write goes to the slot that does not hold the committed generation;
:meth:`BucketFile.commit` syncs the data and then replaces a small header, which says for every record which slot
counts. The header is written beside the old one, synced and renamed over it, so a kill at any moment leaves either
the old header or the new one, and both describe slots that nobody has touched since. It has a checksum, and one for
each record, which is compared when somebody goes on from there.

Records move through page-aligned buffers, without the page cache: one being read ahead, one in the caller's hands,
one being written behind.
"""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from narrowboat.errors import NarrowboatError, SpillError, TrainingError, UsageError
from narrowboat.train.state.header import Commit, Key, Slot, last_extra, read_header, write_header
from narrowboat.train.state.kept import check_length, check_records, end_of
from narrowboat.train.state.layout import PAGE, Buffers, Layout, Record
from narrowboat.train.state.storage_file import StorageFile, spill_error


class BucketFile:
    """Records of named tensors on storage.

    Args:
        folder: where the files go; made if it is not there.
        name: the data are in ``NAME.records``, the header in ``NAME.json``.
        sizes: bytes to reserve for each record, by its name (see :func:`~narrowboat.train.state.layout.record_bytes`).
        fingerprint: whose records these are; a file with another one is not opened.
        resume: go on from the last commit of files that are there already; without any, begin empty.
        generation: number of the commit to go on from, whose records the caller has compared with their checksums
            (see :func:`~narrowboat.train.state.kept.newest_whole`); None for the last one, compared here.
        run: of whom the commits are; a name that no other run has by default. Files of one run have it in common.
        temporary: a file without a name: nothing is left behind, whatever ends the process; ``commit`` does not sync.
        generations: 2, or 1 for scratch: a write then goes over what was there.
        memory: bytes that records read ahead may fill together with those in use; three of the largest by default.
        deferred: nothing is made before :meth:`open`, or the first write. Not with ``resume``.

    Attributes:
        folder, name: as given.
        run: as given, or made.
        closed: whether ``close`` was called.

    Raises:
        SpillError: the folder cannot be used, is full, or is in use by another process, and nothing is left behind;
            or the files that are there are damaged, and stay as they are.
        UsageError: files of that name hold somebody's records and ``resume`` is false.
        TrainingError: they belong to another fingerprint.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        sizes: Mapping[str, int],
        *,
        fingerprint: str = "",
        resume: bool = False,
        generation: int | None = None,
        run: str = "",
        temporary: bool = False,
        generations: int = 2,
        memory: int | None = None,
        deferred: bool = False,
    ) -> None:
        self.folder, self.name = Path(folder), name
        self.run = run or os.urandom(8).hex()
        self.closed = False
        self._data = self.folder / f"{name}.records"
        self._header = self.folder / f"{name}.json"
        self._temporary, self._generations = temporary, generations
        self._resume, self._generation = resume, generation
        self._key = Key(fingerprint, generations)
        self._commits: list[Commit] = [Commit(0, {}, {})]
        self._pending: dict[str, Slot] = {}
        self._homes: dict[str, tuple[int, int]] = {}  # offset and capacity, of records not yet written too
        self._end = 0
        self._unsure = False
        self._lock = threading.Lock()
        self._buffers = Buffers()
        self._reading: dict[str, Future[Record]] = {}
        self._writing: dict[str, Future[int]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._capacities = {record: max(-(-size // PAGE) * PAGE, PAGE) for record, size in sizes.items()}
        self._memory = 3 * max(self._capacities.values(), default=PAGE) if memory is None else memory
        self._file = StorageFile(self.folder if temporary else self._data, temporary=temporary)
        if deferred and not resume:
            self._refuse_kept()
            self._place_all()
        else:
            self.open()

    def open(self) -> None:
        """Make or open the files, if that has not been done yet; errors as the constructor's."""
        if self.closed:
            raise SpillError(f"the records in {self.folder} are closed")
        if self._file.fd >= 0:
            return
        made = not self.folder.is_dir()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise spill_error(error, f"making the folder {self.folder}") from error
        kept, there = False, self._data.exists()
        try:
            self._file.open()
            try:
                if not self._temporary:
                    # Only now that nobody else can write them.
                    kept = self._header.exists()
                    there = there or os.fstat(self._file.fd).st_size > 0
                    self._open_kept()
                self._place_all()
                self._file.reserve(self.file_bytes)
                if kept:
                    self._choose_kept()
            except BaseException:
                self._file.close()
                if not self._temporary and not (kept and there):
                    self._data.unlink(missing_ok=True)
                raise
        except BaseException:
            if made:
                with suppress(OSError):
                    self.folder.rmdir()
            raise

    @staticmethod
    def last_extra(folder: str | Path, name: str) -> dict[str, Any] | None:
        """The ``extra`` of the last commit of files that are not open; None if there is none that can be read."""
        return last_extra(Path(folder) / f"{name}.json")

    @property
    def step(self) -> int:
        """Number given to the last commit; 0 before the first."""
        return self._commits[0].step

    @property
    def extra(self) -> dict[str, Any]:
        """What was given to the last commit beside its number."""
        return self._commits[0].extra

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the commits that :meth:`roll_back` can still reach, newest first."""
        return tuple(commit.step for commit in self._commits)

    @property
    def bytes_written(self) -> int:
        """Bytes written to the data file so far: the wear."""
        return self._file.bytes_written

    @property
    def bytes_read(self) -> int:
        """Bytes read from the data file so far."""
        return self._file.bytes_read

    @property
    def file_bytes(self) -> int:
        """Bytes reserved on storage, or to be reserved."""
        return max(self._end, PAGE)

    @property
    def buffer_peak(self) -> int:
        """The most memory that records have taken at a time, in bytes."""
        return self._buffers.peak

    def __contains__(self, record: str) -> bool:
        """Whether the record was ever written."""
        return record in self._pending or record in self._commits[0].slots

    # -- reading ------------------------------------------------------------------------------------------------

    def prefetch(self, record: str) -> bool:
        """Begin to read a record; False if it is not there, or there is no memory for it now."""
        if record in self._reading:
            return True
        if record not in self:
            return False
        slot = self._slot(record)
        with self._lock:
            if self._buffers.held + slot.layout.nbytes > self._memory:
                return False
            memory = self._buffers.take(slot.layout.nbytes)
        before = self._writing.get(record)
        self._reading[record] = self._pool().submit(self._load, slot, memory, before)
        return True

    def read(self, record: str) -> Record:
        """The record as it was last written, committed or not; give it back with ``write`` or ``release``.

        Raises:
            SpillError: the storage failed.
            KeyError: it was never written.
        """
        future = self._reading.pop(record, None)
        if future is not None:
            loaded = future.result()
        else:
            slot = self._slot(record)
            loaded = self._load(slot, self._take(slot.layout.nbytes), self._writing.get(record))
        loaded.bring()
        return loaded

    def read_into(self, record: str, memory: memoryview) -> Layout:
        """Read a record straight to a place of the caller's: page-aligned, of the record's bytes or more.

        Raises:
            SpillError: the storage failed.
            KeyError: it was never written.
        """
        slot = self._slot(record)
        before = self._writing.get(record)
        if before is not None:
            before.result()
        self._file.read(memory[: slot.layout.nbytes], slot.at)
        return slot.layout

    def layout(self, record: str) -> Layout:
        """Which tensors the record holds, and where in it. KeyError if it was never written."""
        return self._slot(record).layout

    def release(self, record: Record) -> None:
        """Give a record's memory back; its tensors must not be used any more."""
        record.tensors = {}
        with self._lock:
            self._buffers.give(record.memory)

    def _take(self, nbytes: int) -> mmap.mmap:
        if self._buffers.held + nbytes > self._memory:
            self.drop_reads()  # read ahead for later than now: it is read again then
        with self._lock:
            return self._buffers.take(nbytes)

    def _slot(self, record: str) -> Slot:
        return self._pending.get(record) or self._commits[0].slots[record]

    def _load(self, slot: Slot, memory: mmap.mmap, before: Future[int] | None) -> Record:
        try:
            if before is not None:
                before.result()
            if slot.layout.nbytes:
                self._file.read(memoryview(memory)[: slot.layout.nbytes], slot.at)
            return Record(slot.layout, memory)
        except BaseException:
            with self._lock:
                self._buffers.give(memory)
            raise

    # -- writing ------------------------------------------------------------------------------------------------

    def write(self, record: str, tensors: Mapping[str, torch.Tensor], loaded: Record | None = None) -> None:
        """Give a record new contents, behind the caller's back; they count from the next ``commit`` on.

        Args:
            record: its name.
            tensors: what it holds from now on; copied before this returns.
            loaded: the record as it was read, whose memory is given back with this call. Tensors changed in place
                in it are written from where they lie, without a copy.

        Raises:
            SpillError: this or an earlier write failed.
            TrainingError: a tensor that has no plain bytes.
        """
        self.open()
        if self._unsure:
            self._settle()
        if loaded is not None and loaded.holds(tensors):
            ready = loaded
            ready.tensors = {}
        else:
            layout = Layout.of(tensors)
            if loaded is not None and layout.nbytes <= len(loaded.memory) and not loaded.shares(tensors):
                ready = Record(layout, loaded.memory)
                ready.fill(tensors)
            else:
                ready = Record(layout, self._take(layout.nbytes))
                ready.fill(tensors)
                if loaded is not None:
                    self.release(loaded)
        self.drain_writes()  # one at a time: memory stays bounded, and an error is met soon
        slot = self._next_slot(record, ready.layout)
        # From here on the older commit cannot be reached any more: its slots are written over.
        del self._commits[1:]
        self._pending[record] = slot
        stale = self._reading.pop(record, None)
        if stale is not None:
            self.release(stale.result())
        self._writing[record] = self._pool().submit(self._store, slot, ready)

    def _next_slot(self, record: str, layout: Layout) -> Slot:
        offset, capacity = self._homes.get(record, (0, 0))
        if layout.nbytes > capacity:
            offset, capacity = self._place(record, layout.nbytes)
            self._file.reserve(self._end)
        number = 0
        committed = self._commits[0].slots.get(record)
        if self._generations == 2 and committed is not None and committed.offset == offset:
            number = 1 - committed.number
        return Slot(layout, offset, capacity, number)

    def _place(self, record: str, capacity: int) -> tuple[int, int]:
        # A record that outgrew its place leaves it unused: the committed generation is still there.
        self._homes[record] = self._end, capacity
        self._end += self._generations * capacity
        return self._homes[record]

    def _place_all(self) -> None:
        for record, capacity in self._capacities.items():
            if record not in self._homes:
                self._place(record, capacity)

    def _store(self, slot: Slot, record: Record) -> int:
        try:
            return self._put(memoryview(record.memory)[: slot.layout.nbytes], slot)
        finally:
            self.release(record)

    def _put(self, memory: memoryview, slot: Slot) -> int:
        """Write to a slot; the checksum of what was written."""
        if memory:
            self._file.write(memory, slot.at)
        return 0 if self._temporary else zlib.crc32(memory)

    def drain_writes(self) -> None:
        """Wait until what was given to ``write`` is written.

        Raises:
            SpillError: it could not be.
        """
        for record in list(self._writing):
            crc = self._writing.pop(record).result()
            if record in self._pending:
                self._pending[record] = replace(self._pending[record], crc=crc)

    def commit(self, step: int, extra: Mapping[str, Any] | None = None) -> None:
        """Make everything written so far the generation that counts.

        Args:
            step: its number, larger than the last one's.
            extra: what else belongs to it; has to be JSON.

        Raises:
            SpillError: the storage failed; the last commit still counts.
        """
        self.open()
        if self._unsure:
            self._settle()
        self.drain_writes()
        new = Commit(step, dict(extra or {}), {**self._commits[0].slots, **self._pending}, self.run)
        if not self._temporary:
            self._file.sync()
            # An exception between the rename and our own book-keeping leaves us unsure which of the two counts.
            self._unsure = True
            write_header(self._header, self._key, [new, self._commits[0]])
        self._commits = [new, self._commits[0]]
        self._pending = {}
        self._unsure = False

    def discard(self) -> None:
        """Forget what was written since the last commit."""
        with suppress(NarrowboatError):
            self.drain_writes()
        self.drop_reads()
        if self._unsure:
            self._settle()
        self._pending = {}

    def roll_back(self, step: int) -> None:
        """Go back to the commit before the last one, where another file of the same run did not get its commit.

        Only before anything was written after the last commit. Files of one run are kept in step by committing all
        of them before the next write to any, and by rolling back to the least of their steps when they are opened.

        Raises:
            TrainingError: that commit cannot be reached.
        """
        if step not in self.steps:
            raise TrainingError(f"{self._header} holds step {self.step}; step {step} is no longer there")
        self.drop_reads()
        if step != self.step:
            commits = self._commits[self.steps.index(step) :]
            if not self._temporary:
                write_header(self._header, self._key, commits)
            self._commits = commits
            self._pending = {}

    def close(self, *, remove: bool = False) -> None:
        """Stop the threads and close the file; what was not committed is lost.

        Args:
            remove: delete the files too. Files without any commit are deleted in any case.
        """
        self.closed = True
        with suppress(NarrowboatError):
            self.drain_writes()
        self.drop_reads()
        if self._threads is not None:
            self._threads.shutdown(wait=True)
            self._threads = None
        if self._file.fd >= 0 and not self._temporary and (remove or not self._header.exists()):
            for path in (self._header, self._data):
                with suppress(OSError):
                    path.unlink(missing_ok=True)
        self._file.close()
        self._buffers.forget()

    def withdraw(self) -> None:
        """Delete the files, and be as before :meth:`open`: the run that they were made for was refused."""
        self.close(remove=True)
        self.closed = False
        self._commits, self._pending = [Commit(0, {}, {})], {}

    def drop_reads(self) -> None:
        """Forget what was read ahead and not asked for."""
        for record in list(self._reading):
            with suppress(NarrowboatError):
                self.release(self._reading.pop(record).result())

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            if self._file.fd < 0:
                raise SpillError(f"the records in {self.folder} are closed")
            # One reads ahead while the other writes behind.
            self._threads = ThreadPoolExecutor(2, thread_name_prefix="narrowboat-records")
        return self._threads

    # -- the header ---------------------------------------------------------------------------------------------

    def _refuse_kept(self) -> None:
        if not self._temporary and self._header.exists():
            step = read_header(self._header, self._key)[0].step
            raise UsageError(
                f"{self._header} holds records of step {step} already; go on from them (resume=True), "
                "name another folder, or delete them"
            )

    def _open_kept(self) -> None:
        if not self._resume:
            self._refuse_kept()
        if not self._header.exists():
            return  # records without a header were never committed: nobody's
        self._commits = read_header(self._header, self._key)
        for commit in reversed(self._commits):
            for record, slot in commit.slots.items():
                self._homes[record] = slot.offset, slot.capacity
        self._end = end_of(self._commits, self._generations)
        check_length(self._file, self._data, self._end)

    def _choose_kept(self) -> None:
        if self._generation is None:
            check_records(self._file, self._data, self._commits[0])
        else:
            self.roll_back(self._generation)

    def _settle(self) -> None:
        newest = read_header(self._header, self._key) if self._header.exists() else [Commit(0, {}, {})]
        if newest[0].step != self.step:
            self._pending = {}
        self._commits = newest
        self._unsure = False
