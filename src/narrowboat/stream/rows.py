"""Rows of a table read on demand: each page once, sorted, neighbours in one piece, so many bytes at a time."""

from __future__ import annotations

from itertools import islice

import torch

from narrowboat.arena.slab import Slab
from narrowboat.arena.slot import Weight
from narrowboat.profile.rows import GATHER
from narrowboat.stream.reader import PAGE, Extent, Reader

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes are moved, not numbers


class RowReader:
    """Fetches rows through the session's reader.

    Args:
        reader: brings bytes in.
        file_number: the reader's number of each weights file, by path.
        file_bytes: size of each weights file, by number.
    """

    def __init__(self, reader: Reader, file_number: dict[str, int], file_bytes: list[int]) -> None:
        self._reader = reader
        self._file_number = file_number
        self._file_bytes = file_bytes

    def fetch(self, weight: Weight, rows: torch.Tensor, places: torch.Tensor, out: torch.Tensor) -> None:
        """``out[places[i]] = weight[rows[i]]``, reading whole pages past the page cache.

        Args:
            weight: the table.
            rows: flat int64, sorted; may repeat.
            places: flat int64, as many.
            out: one row of the table per place, contiguous.

        Raises:
            StorageError: a read failed.
            WeightsChangedError: the file is shorter than it was.
        """
        entry = weight.entry
        if not rows.numel() or not out.numel():
            return
        size = entry.dtype.itemsize
        row_bytes = entry.nbytes // entry.shape[0]
        width = row_bytes // size
        whole = -(-row_bytes // PAGE) * PAGE + PAGE  # a row and what shares its pages
        slab = Slab(min(max(GATHER, whole), rows.numel() * whole))
        try:
            table = slab.tensor(0, _AS_INTEGERS[size], (slab.nbytes // size,))
            windows = table.as_strided((table.numel() - width + 1, width), (1, 1))  # a row may begin anywhere
            target = out.view(_AS_INTEGERS[size])
            begins = [entry.offset + row * row_bytes for row in rows.tolist()]
            at = 0
            while at < len(begins):
                extents, found = self._next(weight, begins, at, slab.nbytes)
                self._reader.wait(self._reader.submit(weight.name, slab, extents, urgent=True))
                picked = windows.index_select(0, torch.tensor(found) // size)
                target.index_copy_(0, places[at : at + len(found)], picked)
                at += len(found)
        except BaseException:
            self._reader.drain()  # nothing may arrive in memory that is no longer there
            raise
        finally:
            slab.close()

    def _next(self, weight: Weight, begins: list[int], at: int, room: int) -> tuple[list[Extent], list[int]]:
        """What to read for as many rows from ``at`` on as there is room for, and where in the slab each will begin."""
        number = self._file_number[str(weight.entry.file)]
        row_bytes = weight.entry.nbytes // weight.entry.shape[0]
        runs: list[tuple[int, int, int]] = []  # first byte, past the last byte, place in the slab
        found: list[int] = []
        used = 0
        for begin in islice(begins, at, None):
            low, high = begin // PAGE * PAGE, -(-(begin + row_bytes) // PAGE) * PAGE
            joined = bool(runs) and low <= runs[-1][1]
            more = max(high - runs[-1][1], 0) if joined else high - low
            if found and (used + more > room or (len(found) + 1) * row_bytes > GATHER):
                break
            if joined:
                runs[-1] = (runs[-1][0], runs[-1][1] + more, runs[-1][2])
            else:
                runs.append((low, high, used))
            used += more
            found.append(runs[-1][2] + begin - runs[-1][0])
        end = self._file_bytes[number]
        return [Extent(number, low, min(high, end) - low, place) for low, high, place in runs], found
