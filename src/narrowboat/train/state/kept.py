"""What a run left in its folder: the newest step that is whole in all of its files, compared with its checksums.

Weights and optimizer state are two files with commits of their own, two of each. What they say of one step belongs
together only where the commits have the same number and were made by the same process (``Commit.run``).
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowboat.errors import SpillError, UsageError
from narrowboat.train.state.header import REMEDY, Commit, read_header
from narrowboat.train.state.storage_file import StorageFile

_CHUNK = 8 << 20
_GENERATIONS = 2


@dataclass(frozen=True, slots=True)
class Kept:
    """The newest step that is whole.

    Attributes:
        generation: number of the commits that hold it, the same in all files.
        extra: what was given to the commit of the first file beside its number.
    """

    generation: int
    extra: dict[str, Any]


def newest_whole(folder: Path, names: Sequence[str]) -> Kept:
    """The newest step that all of the files hold; every byte of it was read and compared. Nothing is changed.

    Args:
        folder: where they are.
        names: of the files (see ``BucketFile``).

    Raises:
        UsageError: no run has left a whole step there.
        SpillError: a file is missing, in use, damaged or cut short, or they are not of one step of one run.
    """
    headers = [folder / f"{name}.json" for name in names]
    if not any(header.exists() for header in headers):
        raise UsageError(
            f"there is nothing to go on from in {folder}: no run has stored a whole step there; check the path, or "
            "start without resume=True"
        )
    paths = [path for header in headers for path in (header, header.with_suffix(".records"))]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise SpillError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing in {folder} (removed, or the run "
            f"ended in its first step), and without it the rest cannot be used: {REMEDY}"
        )
    # The first commit is written beside an empty one of number 0, which is no step.
    told = [{commit.step: commit for commit in read_header(header) if commit.step} for header in headers]
    common = [step for step in told[0] if len({held[step].run if step in held else None for held in told}) == 1]
    if not common:
        steps = " and ".join(
            f"{header.name} (step {' or '.join(map(str, held))})" for header, held in zip(headers, told, strict=True)
        )
        runs = set.intersection(*({commit.run for commit in held.values()} for held in told))
        raise SpillError(
            f"{steps} in {folder} are of different {'steps' if runs else 'runs'} and cannot be used together: {REMEDY}"
        )
    newest = max(common)
    for header, held in zip(headers, told, strict=True):
        data = header.with_suffix(".records")
        file = StorageFile(data, temporary=False)
        file.open()
        try:
            check_length(file, data, end_of(held.values(), _GENERATIONS))
            check_records(file, data, held[newest])
        finally:
            file.close()
    return Kept(newest, told[0][newest].extra)


def end_of(commits: Iterable[Commit], generations: int) -> int:
    """How many bytes the data file has to have for those commits, each record's space in so many generations."""
    slots = [slot for commit in commits for slot in commit.slots.values()]
    return max((slot.offset + generations * slot.capacity for slot in slots), default=0)


def check_length(file: StorageFile, path: Path, end: int) -> None:
    """Refuse a data file that is shorter than its header says.

    Args:
        file: the file, open.
        path: of it.
        end: bytes that it has to have.

    Raises:
        SpillError: it is shorter.
    """
    there = os.fstat(file.fd).st_size
    if there < end:
        raise SpillError(f"{path} was cut short: {there} bytes instead of {end}; {REMEDY}")


def check_records(file: StorageFile, path: Path, commit: Commit) -> None:
    """Read every record of a commit and compare it with its checksum.

    Args:
        file: the data file, open.
        path: of it.
        commit: what counts.

    Raises:
        SpillError: the bytes of a record are not those that were written, or the storage failed.
    """
    with mmap.mmap(-1, _CHUNK) as memory:
        # In the order of the file: that is how storage reads fastest.
        for record, slot in sorted(commit.slots.items(), key=lambda item: item[1].at):
            crc = 0
            for at in range(0, slot.layout.nbytes, _CHUNK):
                with memoryview(memory)[: min(_CHUNK, slot.layout.nbytes - at)] as piece:
                    file.read(piece, slot.at + at)
                    crc = zlib.crc32(piece, crc)
            if crc != slot.crc:
                raise SpillError(
                    f"{path} is damaged: the {slot.layout.nbytes} bytes from byte {slot.at} on (record {record!r}) "
                    f"are not those that were written; {REMEDY}"
                )


def check_vacant(folder: Path, names: Sequence[str]) -> None:
    """Refuse to begin where a run has left something.

    Raises:
        UsageError: it has.
    """
    for header in [folder / f"{name}.json" for name in names]:
        if header.exists():
            raise UsageError(
                f"{header} holds the steps of a run already; go on from them (resume=True), name another folder, or "
                f"delete what is there ({', '.join(f'{name}.*' for name in names)})"
            )
