"""What of the window is of use under the next plan: bytes that are there are copied, or stay, and are not read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from narrowboat.plan import Plan
from narrowboat.stream.blocks import BlockState, home


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes of a streamed block that go on being its bytes.

    Attributes:
        index: the block's number.
        offset, target: where they lie in the slab, and where they will; the same if they stay.
        nbytes: how many.
    """

    index: int
    offset: int
    target: int
    nbytes: int


def reusable(arrived: Iterable[BlockState], before: Plan, after: Plan) -> list[Move]:
    """The blocks of the window that are in and will be resident, or stream at the same place.

    A copy takes memory beside the window it comes from: as many are made as the larger of the two plans has room for.

    Args:
        arrived: blocks that are in under ``before``.
        before: the plan in force.
        after: the plan that follows, of the same blocks.
    """
    homes = home(after)
    room = max(after.arena_bytes - before.arena_bytes, 0)
    moves = []
    for block in arrived:
        i = block.index
        if block.resident or block.offset is None:
            continue
        if i in after.resident:
            if block.nbytes <= room:
                room -= block.nbytes
                moves.append(Move(i, block.offset, homes[i], block.nbytes))
        elif after.offsets[i] == before.offsets[i] and i in after.streamed:
            moves.append(Move(i, block.offset, block.offset, block.nbytes))
    return moves
