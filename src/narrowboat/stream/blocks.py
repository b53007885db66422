"""A block at run time: its bytes' place, their state, and the weights they show."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from narrowboat.arena.slab import Slab
from narrowboat.arena.slot import Weight
from narrowboat.stream.reader import Extent, Job


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
    job: Job | None = None
    private: Slab | None = None

    @property
    def idle(self) -> bool:
        """Whether its bytes may be overwritten."""
        return self.pins == 0 and self.claims == 0 and self.state is not State.READING

    def bind(self, slab: Slab, base: int) -> None:
        """Give every slot its view of the arena."""
        for weight, place in zip(self.weights, self.places, strict=True):
            for slot in weight.slots:
                slot.bind(slab.tensor(base + place, weight.entry.dtype, weight.entry.shape))

    def show(self) -> None:
        """Let the model see the weights; their bytes are in."""
        if not self.shown:
            for weight in self.weights:
                for slot in weight.slots:
                    slot.put_in()
            self.shown = True
