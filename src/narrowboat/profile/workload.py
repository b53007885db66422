"""From a parameter-use trace to the planner's workload: weights grouped into blocks that swap together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrowboat.arena.slot import Weight
from narrowboat.plan.model import Block
from narrowboat.profile.use_trace import UseTrace

PAGE = 4096
ALIGN = 64  # kernels choose their path by alignment; 64 bytes is what PyTorch's own allocator gives
SMALL = 64 << 10  # not worth a read of its own: rides with the block before it
TARGET = 512 << 10  # blocks are filled up to this before a new one is begun


@dataclass(frozen=True, slots=True)
class Group:
    """The weights of one block.

    Attributes:
        weights: their numbers, in the order they lie in the block.
        places: byte offset of each within the block.
        block: what the planner sees of it.
    """

    weights: tuple[int, ...]
    places: tuple[int, ...]
    block: Block


def form_groups(trace: UseTrace, weights: Sequence[Weight], *, packed: bool) -> list[Group]:
    """Group the weights into blocks, in order of first use; weights the trace never uses come last.

    Weights with the same intervals of use swap together. Small neighbours are merged, so that a read is worth its
    cost; a weight used several times per pass keeps to itself.

    Args:
        trace: the uses of one pass.
        weights: all weights; one that is tiled takes no place, its tiles do.
        packed: the file is page-aligned, so each weight takes whole pages and is read in place; otherwise weights
            are laid 64-byte aligned and copied once.
    """
    holds = use_intervals(trace, len(weights))
    for written in trace.written:
        # Never recycled: its bytes are no longer the file's.
        holds[written] = [(0, max(len(trace.uses) - 1, 0))]
    order = [w for w in dict.fromkeys(w for step in trace.uses for w in step) if weights[w].entry.nbytes]
    seen = set(order)
    unused = [w.index for w in weights if w.index not in seen and w.entry.nbytes and not w.tiled]
    merged: list[tuple[list[int], tuple[tuple[int, int], ...]]] = []
    nbytes = 0
    for w in sorted(order, key=lambda w: holds[w][0][0]):
        intervals = tuple(holds[w])
        size = weights[w].entry.nbytes
        if merged:
            members, before = merged[-1]
            same = intervals == before
            neighbours = len(before) == len(intervals) == 1 and _close(before[0], intervals[0], trace)
            if same or (neighbours and (size < SMALL or nbytes + size <= TARGET)):
                first, last = before[0][0], max(before[0][1], intervals[0][1])
                merged[-1] = ([*members, w], before if same else ((first, last),))
                nbytes += size
                continue
        merged.append(([w], intervals))
        nbytes = size
    groups = [_lay(members, intervals, weights, packed) for members, intervals in merged]
    groups += [_lay([w], (), weights, packed) for w in unused]
    return groups


def _close(before: tuple[int, int], after: tuple[int, int], trace: UseTrace) -> bool:
    # A long hold (a view kept for the whole pass) must not drag its neighbours along.
    span = max(len(trace.uses) // 8, 8)
    return before[1] - before[0] <= span and after[1] - after[0] <= span and after[0] - before[1] <= span


def use_intervals(trace: UseTrace, count: int) -> list[list[tuple[int, int]]]:
    """For each weight, the closed step intervals of use, with views that outlive their step joined in."""
    raw: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for step, used in enumerate(trace.uses):
        for w in used:
            raw[w].append((step, step))
    for w, first, last in trace.holds:
        raw[w].append((first, last))
    joined: list[list[tuple[int, int]]] = []
    for intervals in raw:
        out: list[tuple[int, int]] = []
        for first, last in sorted(intervals):
            if out and first <= out[-1][1] + 1:
                out[-1] = (out[-1][0], max(out[-1][1], last))
            else:
                out.append((first, last))
        joined.append(out)
    return joined


def _lay(members: list[int], holds: tuple[tuple[int, int], ...], weights: Sequence[Weight], packed: bool) -> Group:
    # In file order within the block, so that neighbours in the file are read in one go.
    members = sorted(members, key=lambda w: (str(weights[w].entry.file), weights[w].entry.offset))
    unit = PAGE if packed else ALIGN
    places, at, read = [], 0, 0
    for w in members:
        places.append(at)
        at += -(-weights[w].entry.nbytes // unit) * unit
        read += -(-weights[w].entry.nbytes // PAGE) * PAGE if packed else weights[w].entry.nbytes
    name = weights[max(members, key=lambda w: weights[w].entry.nbytes)].name
    block = Block(name.rsplit(".", 1)[0] if "." in name else name, -(-at // PAGE) * PAGE, read, holds)
    return Group(tuple(members), tuple(places), block)
