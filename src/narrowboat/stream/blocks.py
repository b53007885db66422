"""A block at run time: its bytes' place, their state, the weights they show; and how a plan becomes blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import Any

from narrowboat.arena.slot import Weight
from narrowboat.plan import Plan
from narrowboat.profile.workload import Group
from narrowboat.stream.reader import PAGE, Extent, Job


class State(Enum):
    """Where a block's bytes are."""

    OUT = 0
    READING = 1
    IN = 2


@dataclass(eq=False, slots=True)
class BlockState:
    """One block of the plan in force.

    Attributes:
        index: its number in the plan.
        name: the layer a person knows it by.
        weights: what it shows.
        places: byte offset of each weight within the block.
        offset: where it lies in the slab; None for a block without a place (loaded into memory of its own).
        extents: what to read, and to where.
        meets: streamed blocks whose addresses meet its own.
        resident: it stays in.
        pins: steps in progress that use it.
        claims: upcoming uses the prefetcher has provided for; a claimed block is not evicted.
        shown: the model sees its weights.
        bound: its slots have their views of the arena.
        ready: what its kernels have to come after, on a device; None where nothing is left to wait for.
        private: memory of its own while it is in without a place.
    """

    index: int
    name: str
    nbytes: int
    weights: list[Weight]
    places: tuple[int, ...]
    offset: int | None
    extents: list[Extent]
    resident: bool
    meets: list[BlockState] = field(default_factory=list)
    state: State = State.OUT
    pins: int = 0
    claims: int = 0
    shown: bool = False
    bound: bool = False
    job: Job | None = None
    ready: Any = None
    private: Any = None

    @property
    def idle(self) -> bool:
        """Whether its bytes may be overwritten."""
        return self.pins == 0 and self.claims == 0 and self.state is not State.READING

    def bind(self, slab: Any, base: int) -> None:
        """Give every slot its view of the arena."""
        for weight, place in zip(self.weights, self.places, strict=True):
            for slot in weight.slots:
                slot.bind(slab.tensor(base + place, weight.entry.dtype, weight.entry.shape))
        self.bound = True

    def show(self) -> None:
        """Let the model see the weights; their bytes are in."""
        if not self.shown:
            for weight in self.weights:
                for slot in weight.slots:
                    slot.put_in()
            self.shown = True


def home(plan: Plan) -> list[int]:
    """Where each block lies while it is resident, under any plan of the same blocks; then the end of them all.

    The window follows that end. A block that stays resident from one plan to the next has nothing to do.
    """
    return list(accumulate((block.nbytes for block in plan.blocks), initial=0))


def held_ranges(plan: Plan) -> list[tuple[int, int]]:
    """The ranges ``(offset, nbytes)`` of the slab that the plan holds: the window, and its resident blocks' homes."""
    homes = home(plan)
    window = [(homes[-1], plan.window_bytes)] if plan.window_bytes else []
    return window + [(homes[i], plan.blocks[i].nbytes) for i in sorted(plan.resident) if plan.blocks[i].nbytes]


def beyond(ranges: list[tuple[int, int]], others: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What of ``ranges`` lies beyond ``others``: ranges that begin at the same offset share their first bytes."""
    length = dict(others)
    return [(at + min(length.get(at, 0), n), n - length.get(at, 0)) for at, n in ranges if n > length.get(at, 0)]


def make_blocks(
    plan: Plan,
    groups: list[Group],
    weights: list[Weight],
    file_number: dict[str, int],
    kept: dict[int, BlockState],
    there: Collection[int] = (),
    *,
    bases: Sequence[int | None],
    packed: bool,
) -> list[BlockState]:
    """The blocks of a plan, each knowing its place, what to read, and whose addresses meet its own.

    Args:
        plan: the decisions.
        kept: blocks, by number, that were in under the plan before and stay resident.
        there: numbers of others whose bytes are at their places already.
        groups: the weights of each of the plan's blocks.
        weights: all weights, by number.
        file_number: the reader's number of each weights file, by path.
        bases: where each block lies in the slab; None for one without a place.
        packed: whether the file's tensors begin at page boundaries.
    """
    blocks: list[BlockState] = []
    for i, group in enumerate(groups):
        if i in kept:
            blocks.append(kept[i])
            continue
        base = bases[i]
        assert base is None or base % PAGE == 0, f"{group.block.name} lies at {base}: kernels choose by alignment"
        blocks.append(
            BlockState(
                index=i,
                name=group.block.name,
                nbytes=group.block.nbytes,
                weights=[weights[w] for w in group.weights],
                places=group.places,
                offset=base,
                extents=extents_of(group, weights, file_number, base or 0, packed=packed),
                resident=i in plan.resident,
                state=State.IN if i in there else State.OUT,
            )
        )
    spans = sorted((plan.offsets[i], plan.offsets[i] + plan.blocks[i].nbytes, i) for i in plan.streamed)
    open_spans: list[tuple[int, int]] = []
    for low, high, i in spans:
        open_spans = [(end, j) for end, j in open_spans if end > low]
        for _, j in open_spans:
            blocks[i].meets.append(blocks[j])
            blocks[j].meets.append(blocks[i])
        open_spans.append((high, i))
    return blocks


def extents_of(
    group: Group, weights: list[Weight], file_number: dict[str, int], base: int, *, packed: bool
) -> list[Extent]:
    """What to read for a block; neighbours in a packed file in one piece."""
    extents: list[Extent] = []
    for w, place in zip(group.weights, group.places, strict=True):
        entry = weights[w].entry
        if entry.pieces:
            extents += [
                Extent(file_number[str(piece.file)], piece.offset, piece.nbytes, base + place + at)
                for at, piece in entry.cut(0, entry.nbytes)
            ]
            continue
        number = file_number[str(entry.file)]
        # A tile may begin in the middle of a page, even of a packed file.
        whole_pages = packed and entry.offset % PAGE == 0
        nbytes = -(-entry.nbytes // PAGE) * PAGE if whole_pages else entry.nbytes
        if whole_pages and extents:
            last = extents[-1]
            adjacent = last.target + last.nbytes == base + place and last.offset + last.nbytes == entry.offset
            if last.file == number and adjacent:
                extents[-1] = Extent(number, last.offset, last.nbytes + nbytes, last.target)
                continue
        extents.append(Extent(number, entry.offset, nbytes, base + place))
    return extents
