"""Which streamed blocks keep a copy in pinned host memory, on the way from storage to a device.

A copy in host memory saves reading storage as a resident block does, and saves no copying to the device. A cache of
the blocks read last would hit nothing here either (see ``residency``): what is in it stays in it. What fits is spread
over the pass by the same rule as the resident set, so that the bytes still to be read from storage come due in
proportion to the computing done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from narrowboat.plan.model import Machine, Workload
from narrowboat.plan.residency import evenly_by_time


def host_set(workload: Workload, machine: Machine, streamed: Sequence[int]) -> frozenset[int]:
    """The streamed blocks with a copy in host memory: all if they fit in ``machine.host_room``, else spread evenly.

    A block used several times per pass, which may be read as often, comes before those used once.

    Args:
        streamed: block indices in order of first use.

    Returns:
        Block indices, the same for the same arguments; empty without a device stage.
    """
    room = machine.host_room
    if not machine.copy_bandwidth or room <= 0:
        return frozenset()
    blocks = workload.blocks
    if sum(blocks[i].nbytes for i in streamed) <= room:
        return frozenset(streamed)
    # To storage a cached block is as a resident one: the same rule, over the streamed blocks alone.
    read = tuple(blocks[i] for i in streamed)
    first, left = set(), room
    for at in sorted((at for at, b in enumerate(read) if len(b.holds) > 1), key=lambda at: -len(read[at].holds)):
        if read[at].nbytes <= left:
            first.add(at)
            left -= read[at].nbytes
    return frozenset(streamed[at] for at in evenly_by_time(replace(workload, blocks=read), room, frozenset(first)))
