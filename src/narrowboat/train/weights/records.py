"""Trained weights at rest: one record of a ``BucketFile`` each, read into the window and written from it in place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from narrowboat.checkpoint import TensorEntry
from narrowboat.errors import WeightsChangedError
from narrowboat.stream.reader import Extent, WeightsFile
from narrowboat.train.state.buckets import BucketFile
from narrowboat.train.state.layout import Layout, Place


class WeightRecords(BucketFile):
    """A bucket file whose records hold one weight each, in whole pages."""

    def extent(self, record: str, file: int, target: int) -> Extent:
        """Where the record's newest bytes are, committed or not; KeyError if it was never written.

        Args:
            record: its name.
            file: the reader's number of this file.
            target: offset in the slab where they are wanted.
        """
        slot = self._slot(record)
        return Extent(file, slot.at, slot.layout.nbytes, target)

    def write_from(self, record: str, entry: TensorEntry, memory: memoryview) -> None:
        """Write a record from where its tensor lies; it counts from the next ``commit`` on.

        Args:
            record: its name.
            entry: says dtype and shape.
            memory: its bytes, page-aligned, in whole pages.

        Raises:
            SpillError: the storage failed.
        """
        self.open()
        if self._unsure:
            self._settle()
        stride = torch.empty(entry.shape, device="meta").stride()
        layout = Layout((Place("", entry.dtype, entry.shape, stride, 0),), len(memory))
        slot = self._next_slot(record, layout)
        # From here on the older commit cannot be reached any more: its slots are written over.
        del self._commits[1:]
        self._pending[record] = replace(slot, crc=self._put(memory, slot))

    def as_file(self) -> WeightsFile:
        """What the reader reads the records through; open for as long as this is."""
        return _RecordsFile(self)


class _RecordsFile(WeightsFile):
    """The data file, whose contents change: by nobody but ourselves, for it is locked."""

    def __init__(self, records: WeightRecords) -> None:
        self._records = records
        self.path = Path(records.folder) / f"{records.name}.records"
        self.refusal = ""

    @property
    def fd(self) -> int:  # type: ignore[override]
        return self._records._file.fd

    @property
    def direct(self) -> bool:  # type: ignore[override]
        return self._records._file.direct

    def fall_back(self, reason: str) -> None:
        if self.direct:
            self._records._file._fall_back(reason)

    def check_open_file(self) -> None:
        if self._records.closed:
            raise WeightsChangedError(f"the trained weights in {self.path.parent} are closed")

    def check_path(self) -> None:
        self.check_open_file()

    def close(self) -> None:
        """Its owner closes it."""
