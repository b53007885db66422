"""Better plans than the rules of thumb give: everything tried where that is little, else a hill climb with a bound.

A candidate is a resident set, the streamed blocks and their places. On a handful of blocks every resident set is
tried with every way in which the others can share addresses. On more, blocks that stall change places with resident
ones for as long as that shortens the pass and the bound says that there is something left to gain.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations, product

from narrowboat.plan.layout import concurrent_sets, place
from narrowboat.plan.model import Block, Machine, Workload
from narrowboat.plan.timing import Timing, simulate

Candidate = tuple[frozenset[int], tuple[int, ...], list[int], int]  # resident, streamed, their offsets, window bytes
FEW = 4  # blocks up to which everything is tried
ENOUGH = 2e-3  # a plan so close to the bound is not searched for a better one
_STEPS = 40_000  # block visits of the simulation that one search may cost, about a second


def every_candidate(workload: Workload, room: int) -> Iterator[Candidate]:
    """All resident sets, each with one layout of every kind; for a handful of blocks."""
    blocks = workload.blocks
    numbers = range(len(blocks))
    for count in range(len(blocks) + 1):
        for chosen in combinations(numbers, count):
            resident = frozenset(chosen)
            window = room - sum(blocks[i].nbytes for i in chosen)
            if window < 0:
                continue
            streamed = tuple(i for i in numbers if i not in resident)
            for places in _layouts([blocks[i] for i in streamed], window):
                yield resident, streamed, places, window


def _layouts(blocks: Sequence[Block], window: int) -> Iterator[list[int]]:
    """One layout for every way in which blocks can meet.

    A block can be moved down until it touches one that it does not meet, and meets no more than before: so it begins
    at 0 or where a chain of others ends, at a sum of sizes.
    """
    together = concurrent_sets(blocks)
    sums = [
        sorted({sum(other) for n in range(len(blocks)) for other in combinations(_sizes_without(blocks, i), n)})
        for i in range(len(blocks))
    ]
    seen: set[tuple[bool, ...]] = set()
    for places in product(*([at for at in sums[i] if at + b.nbytes <= window] for i, b in enumerate(blocks))):
        meets = tuple(
            places[i] < places[j] + blocks[j].nbytes and places[j] < places[i] + blocks[i].nbytes
            for i in range(len(blocks))
            for j in range(i)
        )
        if meets in seen:
            continue
        seen.add(meets)
        pairs = ((i, j) for i in range(len(blocks)) for j in range(i))
        if not any(meet and j in together[i] for meet, (i, j) in zip(meets, pairs, strict=True)):
            yield list(places)


def _sizes_without(blocks: Sequence[Block], i: int) -> list[int]:
    return [block.nbytes for j, block in enumerate(blocks) if j != i]


def climb(
    workload: Workload, machine: Machine, room: int, start: Candidate, timing: Timing, bound: float
) -> tuple[Candidate, Timing]:
    """Exchange streamed blocks that stall for resident ones, while it helps.

    Args:
        room: bytes for weights.
        start: where to begin, and
        timing: its prediction.
        bound: no plan is faster.

    Returns:
        The best candidate found and its prediction; the same for the same arguments.
    """
    blocks = workload.blocks
    chance = random.Random(0)
    best, best_timing = start, timing
    tries = max(_STEPS // max(len(blocks) * 3, 1), 10)
    while tries > 0 and best_timing.latency > bound * (1 + ENOUGH):
        resident = set(best[0])
        free = room - best[3] - sum(blocks[i].nbytes for i in resident)
        stalls = best_timing.stall_by_block
        tries -= 1
        if stalls and chance.random() < 0.8:
            pulled = chance.choices(list(stalls), weights=list(stalls.values()))[0]
        else:
            pulled = chance.choice(best[1])
        window = best[3]
        # Now and then the window pays for it, or gets what is let go.
        if chance.random() < 0.25:
            window = max(window - blocks[pulled].nbytes, 0)
            free += best[3] - window
        candidates = sorted(resident, key=lambda i: chance.random())
        for i in candidates:
            if free >= blocks[pulled].nbytes:
                break
            resident.discard(i)
            free += blocks[i].nbytes
        if free < blocks[pulled].nbytes:
            continue
        resident.add(pulled)
        free -= blocks[pulled].nbytes
        # What is left over takes in again what it can.
        for i in sorted((i for i in range(len(blocks)) if i not in resident), key=lambda i: chance.random()):
            if blocks[i].nbytes <= free and i != pulled and blocks[i].holds:
                resident.add(i)
                free -= blocks[i].nbytes
        streamed = tuple(i for i in range(len(blocks)) if i not in resident)
        window += free
        places = place([blocks[i] for i in streamed], window)
        if places is None:
            continue
        found = simulate(workload, machine, resident, streamed, places, passes=3)
        if found.latency < best_timing.latency * (1 - 1e-4):
            best, best_timing = (frozenset(resident), streamed, places, window), found
    return best, best_timing
