"""The small file that says which slot of every record counts: written whole beside the old one, renamed over it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrowboat.checkpoint.atomic_file import atomic_file
from narrowboat.checkpoint.files import write_all
from narrowboat.errors import SpillError, StorageError, TrainingError, UsageError
from narrowboat.train.state.layout import Layout
from narrowboat.train.state.storage_file import spill_error

_FORMAT = "narrowboat buckets 2"
REMEDY = "put its folder back from one copy, or delete what is there and start anew (without resume=True)"


@dataclass(frozen=True, slots=True)
class Slot:
    """One generation of a record.

    Attributes:
        layout: which tensors it holds, and where.
        offset: where the record's space begins in the file.
        capacity: bytes of one slot.
        number: which slot.
        crc: CRC-32 of the record's bytes; 0 until they are written, and in files without a name.
    """

    layout: Layout
    offset: int
    capacity: int
    number: int
    crc: int = 0

    @property
    def at(self) -> int:
        """Where the slot begins in the file."""
        return self.offset + self.number * self.capacity


@dataclass(frozen=True, slots=True)
class Commit:
    """What counted at a step.

    Attributes:
        step: its number.
        extra: what belongs to it beside the records.
        slots: for every record, the slot that counts.
        run: of whom it is: files whose commits belong together have the same here, and no others have.
    """

    step: int
    extra: dict[str, Any]
    slots: dict[str, Slot]
    run: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """Whose records, and in how many generations: a header with another key is not read."""

    fingerprint: str
    generations: int


def write_header(path: Path, key: Key, commits: Sequence[Commit]) -> None:
    """Replace the header; on return it is durable.

    Raises:
        SpillError: it could not be; the old one is there still.
    """
    places: dict[tuple[Layout, int, int], int] = {}
    told = []
    for commit in commits:
        slots = {
            record: [places.setdefault((slot.layout, slot.offset, slot.capacity), len(places)), slot.number, slot.crc]
            for record, slot in commit.slots.items()
        }
        told.append({"step": commit.step, "run": commit.run, "extra": commit.extra, "slots": slots})
    content = {
        "format": _FORMAT,
        "fingerprint": key.fingerprint,
        "generations": key.generations,
        "places": [[layout.to_json(), layout.nbytes, *place] for (layout, *place) in places],
        "commits": told,
    }
    body = json.dumps(content, separators=(",", ":")).encode()
    try:
        with atomic_file(path, overwrite=True) as (descriptor, temporary):
            write_all(descriptor, temporary, b"%08x\n" % zlib.crc32(body) + body, 0)
    except (UsageError, StorageError) as error:
        raise SpillError(f"the step could not be committed: {error}") from error


def read_header(path: Path, key: Key | None = None) -> list[Commit]:
    """The commits that can be reached, newest first.

    Args:
        path: of the header.
        key: whose it has to be; None for whoever's it is.

    Raises:
        SpillError: the header cannot be read, is damaged, or of another version.
        TrainingError: the records are somebody else's.
    """
    content = _content(path)
    if content.get("format") != _FORMAT or (key is not None and content["generations"] != key.generations):
        raise SpillError(
            f"{path} was written by another version of narrowboat, or for another use; name another folder, or "
            "delete what is there"
        )
    if key is not None and content["fingerprint"] != key.fingerprint:
        raise TrainingError(
            f"{path} holds records of another optimizer or of other parameters; "
            "name another folder, or build what it was made for"
        )
    places = [
        (Layout.from_json(rows, nbytes), offset, capacity) for rows, nbytes, offset, capacity in content["places"]
    ]
    commits = []
    for told in content["commits"]:
        slots = {}
        for record, (place, number, crc) in told["slots"].items():
            layout, offset, capacity = places[place]
            slots[record] = Slot(layout, offset, capacity, number, crc)
        commits.append(Commit(told["step"], told["extra"], slots, told["run"]))
    return commits


def last_extra(path: Path) -> dict[str, Any] | None:
    """The ``extra`` of the last commit, whoever's it is; None if there is no header that can be read."""
    try:
        return dict(_content(path)["commits"][0]["extra"])
    except SpillError:
        return None


def _content(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise spill_error(error, f"reading {path}") from error
    crc, _, body = raw.partition(b"\n")
    if crc != b"%08x" % zlib.crc32(body):
        raise SpillError(f"{path} is damaged, so the records beside it cannot be used: {REMEDY}")
    return dict(json.loads(body))
