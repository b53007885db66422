"""Better plans than the rules of thumb give: everything tried where that is little, else a hill climb with a bound.

A candidate is a resident set, the streamed blocks and their places. On a handful of blocks every resident set is
tried with every way in which the others can share addresses. On more, blocks that stall change places with resident
ones for as long as that shortens the pass and the bound says that there is something left to gain; then, on a device,
blocks that are read with those that have a copy in host memory.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import combinations, product

from narrowboat.plan.layout import concurrent_sets, place, place_apart
from narrowboat.plan.model import Block, Machine, Workload
from narrowboat.plan.tiers import host_set
from narrowboat.plan.timing import Lead, Timing, simulate

Candidate = tuple[frozenset[int], tuple[int, ...], list[int], int]  # resident, streamed, their offsets, window bytes
FEW = 4  # blocks up to which everything is tried
ENOUGH = 2e-3  # a plan so close to the bound is not searched for a better one
_STEPS = 120_000  # block visits of the simulation that one search may cost, about a second
_MOST_TRIES, _PATIENCE = 600, 150  # exchanges tried in all, and in a row without one that helps
_FOLLOWING = 8  # reads that a block let go is taken to delay


def improves(found: Timing, best: Timing, *, by: float = 0.0) -> bool:
    """Whether a pass is shorter by more than a share ``by`` of it, or as short with less to read.

    What is read takes power and the processor's time, and what is copied to a device less of both; where it gains
    nothing, it is better left.
    """
    slack = best.latency * 1e-6
    if found.latency < best.latency * (1 - by) - slack:
        return True
    fewer = (found.bytes_read, found.bytes_copied) < (best.bytes_read, best.bytes_copied)
    return fewer and found.latency <= best.latency + slack


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


def every_cache(workload: Workload, machine: Machine, streamed: Sequence[int]) -> Iterator[frozenset[int]]:
    """All sets of streamed blocks that fit in host memory; the empty one alone without a device stage."""
    sizes = {i: workload.blocks[i].nbytes for i in streamed}
    for count in range(len(sizes) + 1 if machine.copy_bandwidth else 1):
        for chosen in combinations(sizes, count):
            if sum(sizes[i] for i in chosen) <= machine.host_room:
                yield frozenset(chosen)


def climb(
    workload: Workload, machine: Machine, room: int, start: Candidate, timing: Timing, bound: float
) -> tuple[Candidate, Timing]:
    """Exchange streamed blocks that are waited for against resident ones where reads come early, while it helps.

    A wait has a cause: the reads since the channel last rested. Any of them made resident shortens it. What is let go
    in exchange costs nothing where the reads that follow come early enough.

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
    best, best_timing, lead = start, timing, _lead_of(workload, machine, start)
    tries, in_vain = _tries(blocks), 0
    while tries > 0 and in_vain < _PATIENCE and best_timing.latency > bound * (1 + ENOUGH):
        tries -= 1
        in_vain += 1
        found = _exchange(workload, room, best, best_timing, lead, chance)
        if found is None:
            continue
        seen = Lead()
        took = simulate(workload, machine, *found[:3], passes=3, lead=seen)
        if improves(took, best_timing, by=1e-5):
            best, best_timing, lead, in_vain = found, took, seen, 0
    return best, best_timing


def climb_cache(
    workload: Workload, machine: Machine, candidate: Candidate, timing: Timing, bound: float
) -> tuple[frozenset[int], Timing]:
    """Exchange blocks with a copy in host memory against others read before a wait, while that shortens the pass.

    The spread by time knows nothing of places and of where a pass begins; what it is off by is made up for here.

    Args:
        candidate: stays as it is.
        timing: its prediction with ``host_set``, where this begins.
        bound: no plan is faster.

    Returns:
        The best cached set found and the prediction with it; the same for the same arguments.
    """
    resident, streamed, places, _ = candidate
    best, best_timing = host_set(workload, machine, streamed), timing
    if not best or len(best) == len(streamed):
        return best, best_timing
    lead, chance = _lead_of(workload, machine, candidate), random.Random(0)
    tries, in_vain = _tries(workload.blocks), 0
    while tries > 0 and in_vain < _PATIENCE and best_timing.latency > bound * (1 + ENOUGH):
        tries -= 1
        in_vain += 1
        cached = _exchange_cached(workload, machine.host_room, streamed, best, best_timing, lead, chance)
        if cached is None:
            continue
        seen = Lead()
        took = simulate(workload, machine, resident, streamed, places, passes=3, lead=seen, cached=cached)
        if improves(took, best_timing, by=1e-5):
            best, best_timing, lead, in_vain = cached, took, seen, 0
    return best, best_timing


def _exchange_cached(
    workload: Workload,
    room: int,
    streamed: Sequence[int],
    best: frozenset[int],
    timing: Timing,
    lead: Lead,
    chance: random.Random,
) -> frozenset[int] | None:
    """A cached set of at most ``room`` bytes beside ``best``; None if what was tried does not fit or is the same."""
    blocks, stalls = workload.blocks, timing.stall_by_block
    if not stalls:
        return None
    waited = chance.choices(list(stalls), weights=list(stalls.values()))[0]
    run = [i for i in _run_before(waited, streamed, lead) if i not in best]
    cached = {*best, *chance.sample(run, min(len(run), chance.choice((1, 1, 2))))}
    free = room - sum(blocks[i].nbytes for i in cached)
    slack = _slack(set(best), streamed, lead)
    for i in sorted(best, key=lambda i: slack[i] * chance.random(), reverse=True):
        if free >= 0:
            break
        cached.discard(i)
        free += blocks[i].nbytes
    for i in sorted(streamed, key=lambda i: blocks[i].nbytes * chance.random(), reverse=True):
        if i not in cached and blocks[i].nbytes <= free:
            cached.add(i)
            free -= blocks[i].nbytes
    return None if free < 0 or cached == best else frozenset(cached)


def _tries(blocks: Sequence[Block]) -> int:
    """How many candidates a search may try."""
    visits = sum(len(block.holds) for block in blocks) * 3
    return min(max(_STEPS // max(visits, 1), 10), _MOST_TRIES)


def _lead_of(workload: Workload, machine: Machine, candidate: Candidate) -> Lead:
    lead = Lead()
    simulate(workload, machine, *candidate[:3], passes=3, lead=lead)
    return lead


def _exchange(
    workload: Workload, room: int, best: Candidate, timing: Timing, lead: Lead, chance: random.Random
) -> Candidate | None:
    """A candidate beside ``best``; None if what was tried does not fit."""
    blocks = workload.blocks
    resident, streamed, window = set(best[0]), best[1], best[3]
    free = room - window - sum(blocks[i].nbytes for i in resident)
    if not streamed:
        return None
    stalls = timing.stall_by_block
    pulled: list[int] = []
    if stalls and chance.random() < 0.85:
        waited = chance.choices(list(stalls), weights=list(stalls.values()))[0]
        run = _run_before(waited, streamed, lead)
        pulled = chance.sample(run, min(len(run), chance.choice((1, 1, 2, 4))))
    else:
        pulled = [chance.choice(streamed)]
    # Now and then the window pays for it, or gets what is let go.
    chosen = chance.random()
    if chosen < 0.2:
        window = max(window - sum(blocks[i].nbytes for i in pulled), 0)
        free += best[3] - window
    elif chosen < 0.3:
        pulled = []
    needed = sum(blocks[i].nbytes for i in pulled)
    slack = _slack(resident, streamed, lead)
    for i in sorted(resident, key=lambda i: slack[i] * chance.random(), reverse=True):
        if free >= needed and pulled:
            break
        resident.discard(i)
        free += blocks[i].nbytes
        if not pulled:  # the window grows by it
            break
    if free < needed:
        return None
    resident.update(pulled)
    free -= needed
    if pulled:
        # What is left over takes in again what it can, first where there is waiting.
        order = [i for i in streamed if i not in resident and blocks[i].holds]
        for i in sorted(order, key=lambda i: lead.early.get(i, 0.0) + chance.random() * 1e-3):
            if blocks[i].nbytes <= free:
                resident.add(i)
                free -= blocks[i].nbytes
    left = tuple(i for i in range(len(blocks)) if i not in resident)
    window += free
    rest = [blocks[i] for i in left]
    places = (place_apart(rest, window) if chance.random() < 0.5 else None) or place(rest, window)
    return None if places is None else (frozenset(resident), left, places, window)


def _run_before(waited: int, streamed: Sequence[int], lead: Lead) -> list[int]:
    """The streamed blocks read in one go up to ``waited``, since the channel last rested; it is one of them."""
    at = streamed.index(waited)
    run = []
    for step in range(len(streamed)):
        i = streamed[at - step]  # wraps into the pass before
        run.append(i)
        if i in lead.rested:
            break
    return run


def _slack(resident: set[int], streamed: Sequence[int], lead: Lead) -> dict[int, float]:
    """For each resident block, by how much the reads that would follow its own come early: the least of a few."""
    early = [max(lead.early.get(i, 0.0), 1e-6) for i in streamed]
    slack = {}
    for i in resident:
        at = bisect_left(streamed, i)
        slack[i] = min((early[(at + k) % len(early)] for k in range(_FOLLOWING)), default=1e-6)
    return slack
