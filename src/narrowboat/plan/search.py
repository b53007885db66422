"""Better plans than the rules of thumb give: everything tried where that is little, else a hill climb with a bound.

A candidate is a resident set, the streamed blocks and their places. On a handful of blocks every resident set is
tried with every order of laying the others down (lowest place that fits: some order gives every layout that cannot be
pushed together further). On more, blocks that stall change places with resident ones for as long as that shortens the
pass and the bound says that there is something left to gain.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, permutations

from narrowboat.plan.layout import concurrent_sets, first_fit, place
from narrowboat.plan.model import Machine, Workload
from narrowboat.plan.timing import Timing, simulate

Candidate = tuple[frozenset[int], tuple[int, ...], list[int], int]  # resident, streamed, their offsets, window bytes
FEW = 5  # blocks up to which everything is tried
ENOUGH = 2e-3  # a plan so close to the bound is not searched for a better one
_STEPS = 40_000  # block visits of the simulation that one search may cost, about a second


def every_candidate(workload: Workload, room: int) -> Iterator[Candidate]:
    """All resident sets with all layouts; for a handful of blocks."""
    blocks = workload.blocks
    numbers = range(len(blocks))
    for count in range(len(blocks) + 1):
        for chosen in combinations(numbers, count):
            resident = frozenset(chosen)
            window = room - sum(blocks[i].nbytes for i in chosen)
            if window < 0:
                continue
            streamed = tuple(i for i in numbers if i not in resident)
            seen = set()
            rest = [blocks[i] for i in streamed]
            together = concurrent_sets(rest)
            for order in permutations(range(len(streamed))):
                # Blocks never needed together may share addresses or not: both are tried, by how many stay apart.
                for apart in range(len(streamed) + 1):
                    places: dict[int, int] = {}
                    for turn, i in enumerate(order):
                        near = set(order[max(turn - apart, 0) : turn]) | {j for j in places if j in together[i]}
                        taken = sorted((places[j], places[j] + rest[j].nbytes) for j in near if j in places)
                        at = first_fit(taken, 0, rest[i].nbytes, window)
                        if at is None:
                            break
                        places[i] = at
                    else:
                        key = tuple(places[i] for i in range(len(streamed)))
                        if key not in seen:
                            seen.add(key)
                            yield resident, streamed, list(key), window


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
