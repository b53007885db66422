"""One expert's rows of one weight: where they lie, at rest and in memory, and what is known of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch

from narrowboat.arena.slot import Weight
from narrowboat.plan.experts import Policy
from narrowboat.profile.experts import Stack, span
from narrowboat.stream.blocks import State
from narrowboat.stream.reader import PAGE, Extent, Job


class Cause(Enum):
    """Why an expert that nobody has used yet was read."""

    ASKED = 0  # an operator wants it
    SIBLING = 1  # the operator before uses another weight of the same expert
    FORESEEN = 2  # it is thought that the next stack will want it


@dataclass(eq=False, slots=True)
class Cell:
    """One expert's rows of one weight.

    Attributes:
        key: its number.
        weight: the weight.
        expert: the row.
        low, high: the pages it takes in the slab, past the last.
        extents: what to read, and to where.
        state: where its bytes are.
        job: the read under way.
        lease: the one-row tensor over it that operators took views of, and its storage.
        cause: why it was read; ``ASKED`` once it was used.
    """

    key: int
    weight: Weight
    expert: int
    low: int
    high: int
    extents: tuple[Extent, ...]
    state: State = State.OUT
    job: Job | None = None
    lease: tuple[torch.Tensor, Any] | None = None
    cause: Cause = Cause.ASKED

    @property
    def nbytes(self) -> int:
        """Bytes it counts for."""
        return self.high - self.low


@dataclass
class ExpertCounts:
    """What the cache did.

    Attributes:
        hits, misses: uses of an expert's weight that was in, and that had to be read for it.
        bytes_read: bytes read for experts.
        bytes_ahead: of those, read because the next stack was thought to want them.
        bytes_foreseen: of those, that it did want.
        shares: share of bytes that each policy would have hit, at the last choice.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_ahead: int = 0
    bytes_foreseen: int = 0
    shares: dict[Policy, float] = field(default_factory=dict)


def lay_out(
    stacks: Sequence[Stack], weights: Sequence[Weight], file_number: dict[str, int], packed: bool
) -> tuple[list[Cell], dict[int, int], dict[int, int], int]:
    """Give every expert its place.

    Returns:
        The cells; by weight, the key of its first cell, and the byte at which it begins; the bytes of it all.
    """
    cells: list[Cell] = []
    firsts: dict[int, int] = {}
    bases: dict[int, int] = {}
    base = 0
    for weight in (weights[w] for stack in stacks for w in stack.weights):
        entry = weight.entry
        row = entry.nbytes // entry.shape[0]
        firsts[weight.index], bases[weight.index] = len(cells), base
        # A file that is aligned gives whole pages, and what neighbours share of one is the same bytes for both.
        paged = packed and entry.offset % PAGE == 0 and not entry.pieces
        for e in range(entry.shape[0]):
            low, high = span(weight, e)
            if paged:
                number = file_number[str(entry.file)]
                extents = [Extent(number, entry.offset + low, high - low, base + low)]
            else:
                extents = [
                    Extent(file_number[str(piece.file)], piece.offset, piece.nbytes, base + e * row + at)
                    for at, piece in entry.cut(e * row, (e + 1) * row)
                ]
            cells.append(Cell(len(cells), weight, e, base + low, base + high, tuple(extents)))
        base += -(-entry.nbytes // PAGE) * PAGE
    return cells, firsts, bases, base


def runs(cells: Sequence[Cell], most: int) -> list[list[Cell]]:
    """Neighbours in one piece, up to ``most`` bytes, in the order of their keys."""
    found: list[list[Cell]] = []
    for cell in sorted(cells, key=lambda cell: cell.key):
        follows = bool(found) and found[-1][-1].key + 1 == cell.key and found[-1][-1].weight is cell.weight
        if follows and sum(c.nbytes for c in found[-1]) + cell.nbytes <= most:
            found[-1].append(cell)
        else:
            found.append([cell])
    return found


def joined(cells: Sequence[Cell]) -> list[Extent]:
    """What to read for neighbours: what follows on in the file and in memory, or is shared, in one piece."""
    found: list[Extent] = []
    for extent in (extent for cell in cells for extent in cell.extents):
        if found:
            last = found[-1]
            step = extent.offset - last.offset
            if extent.file == last.file and 0 <= step <= last.nbytes and step == extent.target - last.target:
                found[-1] = Extent(last.file, last.offset, step + extent.nbytes, last.target)
                continue
        found.append(extent)
    return found


def neighbours(cells: Sequence[Cell], cell: Cell) -> list[Cell]:
    """The cells that share a page with this one."""
    found = []
    for step in (-1, 1):
        at = cell.key + step
        while 0 <= at < len(cells) and cells[at].low < cell.high and cells[at].high > cell.low:
            found.append(cells[at])
            at += step
    return found
