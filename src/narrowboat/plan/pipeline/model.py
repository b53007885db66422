"""What a split is made of: the pieces of the model in order, the nodes, and the links between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from narrowboat.plan.model import Machine, Workload
from narrowboat.plan.pipeline.recurrence import Hop

CALLER = ""
"""The name under which links know the process that gives the inputs and takes the outputs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of the model that is never cut.

    Attributes:
        name: the layer it begins with.
        workload: its own steps and blocks; ``fixed_bytes`` is what computing takes beside weights at its peak.
        kept_bytes: what it takes for as long as the stage lives: buffers, bookkeeping.
        sends: bytes of every tensor that a later piece needs, alive when this one ends; of the last, the outputs.
    """

    name: str
    workload: Workload
    kept_bytes: int
    sends: int


@dataclass(frozen=True, slots=True)
class Chain:
    """The model.

    Attributes:
        pieces: in order of execution.
        enters: bytes of one input.
    """

    pieces: tuple[Piece, ...]
    enters: int

    def crossing(self, at: int) -> int:
        """Bytes that cross where the pieces before ``at`` end: of one input at 0."""
        return self.pieces[at - 1].sends if at else self.enters


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    Attributes:
        name: of it.
        budget: bytes it gives.
        machine: its storage.
        pace: its computing seconds over those of the pieces.
        staging: bytes of its budget that any stage on it takes (reading a file that is not packed).
    """

    name: str
    budget: int
    machine: Machine
    pace: float = 1.0
    staging: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """From one node to another.

    Attributes:
        latency: seconds from sending to arrival, on top of the bytes.
        bandwidth: bytes per second.
    """

    latency: float
    bandwidth: float

    def hop(self, nbytes: int) -> Hop:
        """What sending so many bytes takes."""
        return Hop(self.latency, nbytes / self.bandwidth)


Links = Mapping[tuple[str, str], Link]
"""By the names of sender and receiver; ``CALLER`` is the caller. One that is missing costs nothing."""

_FREE = Link(0.0, float("inf"))


def link_between(links: Links, sender: str, receiver: str) -> Link:
    """The link, or one that costs nothing."""
    return links.get((sender, receiver), _FREE)
