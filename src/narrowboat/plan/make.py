"""The plan: what stays resident, what streams, where each block lies, and how long a pass will take.

If everything fits, everything is resident. Otherwise a range of window sizes is tried, each with the resident set
spread over the network, and the one with the shortest predicted pass wins; among equals the smallest window, because
what the window does not take is resident. Asked to be thorough, it searches on
until the bound says that it is enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from narrowboat.errors import BudgetError
from narrowboat.plan.bound import latency_bound
from narrowboat.plan.layout import peak_held, place, place_apart
from narrowboat.plan.model import PAGE, Block, Machine, Workload
from narrowboat.plan.residency import Spread, evenly_by_bytes, evenly_by_time
from narrowboat.plan.result import Plan
from narrowboat.plan.schemes import SCHEMES, check_names
from narrowboat.plan.search import ENOUGH, FEW, Candidate, climb, climb_cache, every_cache, every_candidate, improves
from narrowboat.plan.tiers import host_set
from narrowboat.plan.timing import Timing, simulate
from narrowboat.quantities import format_bytes

_SPREADS: tuple[Spread, ...] = (evenly_by_time, evenly_by_bytes)
_PATIENCE = 12  # candidates in a row that bring nothing before the search ends
_WORTH = 1e-3  # what another scheme has to gain: they read more


def minimum_budget(workload: Workload) -> tuple[int, str]:
    """The smallest budget in bytes for which a plan exists, and the layer or part that sets it."""
    window = _least_window(workload.blocks)
    _, step = peak_held(workload.blocks)
    names = [b.name for b in workload.blocks if any(first <= step <= last for first, last in b.holds)]
    largest = max(
        (b for b in workload.blocks if any(first <= step <= last for first, last in b.holds)),
        key=lambda b: b.nbytes,
        default=None,
    )
    if largest is None:
        limiter = "activations and buffers"
    else:
        limiter = f"{largest.name} ({format_bytes(largest.nbytes)})"
        if len(names) > 1:
            limiter += f" with {len(names) - 1} more in use at the same time"
    return window + workload.fixed_bytes, limiter


@lru_cache(maxsize=2)
def _least_window(blocks: tuple[Block, ...]) -> int:
    """Smallest window in which all blocks can be laid; at worst that of keeping every block."""
    lower, _ = peak_held(blocks)
    total = sum(block.nbytes for block in blocks)
    window = lower
    while window < total:
        if place(blocks, window) is not None:
            return window
        window = min(total, max(window + PAGE, int(window * 1.05) // PAGE * PAGE))
    return total


def make_plan(
    workload: Workload, machine: Machine, budget: int, *, scheme: str = "best", thorough: bool = False
) -> Plan:
    """Decide for ``budget`` bytes.

    Args:
        scheme: ``"best"``, or the name of one of ``plan.schemes``, for comparison.
        thorough: search on, for a second or so, where the rules of thumb stay behind the bound.

    Raises:
        BudgetError: no plan fits; carries the smallest budget that would do and the layer that sets it.
        UsageError: no such scheme.
    """
    least = check_budget(workload, budget)
    room = (budget - workload.fixed_bytes) // PAGE * PAGE  # a place off the page grid would cost a copy per read
    if scheme != "best":
        return _by_scheme(workload, machine, budget, least, scheme)
    bound = latency_bound(workload, machine, room)
    best, timing = _by_rules(workload, machine, room)
    cached = None
    if thorough and timing.latency > bound * (1 + ENOUGH):
        for scheme_of in SCHEMES.values():
            decided = scheme_of(workload, machine, room)
            if decided is not None:
                _, resident, streamed, places = decided
                found = simulate(workload, machine, resident, streamed, places, passes=3)
                if improves(found, timing, by=_WORTH):
                    window = room - sum(workload.blocks[i].nbytes for i in resident)
                    best, timing = (resident, streamed, places, window), found
        if len(workload.blocks) <= FEW:
            for candidate in every_candidate(workload, room):
                for tried in every_cache(workload, machine, candidate[1]):
                    found = simulate(workload, machine, *candidate[:3], passes=3, cached=tried)
                    if improves(found, timing):
                        best, timing, cached = candidate, found, tried
        else:
            best, timing = climb(workload, machine, room, best, timing, bound)
            cached, timing = climb_cache(workload, machine, best, timing, bound)
    return replace(_assemble(workload, machine, budget, least, best, timing, cached), lower_bound=bound)


def _by_rules(workload: Workload, machine: Machine, room: int) -> tuple[Candidate, Timing]:
    best: tuple[Candidate, Timing] | None = None
    worse = 0
    for candidate in _candidates(workload, room):
        timing = simulate(workload, machine, *candidate[:3], passes=3)
        # A window has to earn its bytes: half a percent, or the smaller one stays.
        if best is not None and timing.latency > best[1].latency * (1 - 5e-3):
            worse += 1
            if worse >= _PATIENCE:
                break
            continue
        worse = 0
        best = candidate, timing
    assert best is not None  # the least window is among the candidates
    return best


def _by_scheme(workload: Workload, machine: Machine, budget: int, least: tuple[int, str], scheme: str) -> Plan:
    check_names(scheme)
    room = (budget - workload.fixed_bytes) // PAGE * PAGE
    decided = SCHEMES[scheme](workload, machine, room)
    if decided is None:
        raise BudgetError(
            f"scheme {scheme!r} cannot hold this model in {format_bytes(budget)}; scheme 'best' can",
            minimum=workload.fixed_bytes + workload.weight_bytes,
            limiter=scheme,
        )
    changed, resident, streamed, places = decided
    timing = simulate(changed, machine, resident, streamed, places, passes=3)
    plan = _assemble(changed, machine, budget, least, (resident, streamed, places, 0), timing)
    return replace(plan, lower_bound=latency_bound(workload, machine, room), scheme=scheme)


def check_budget(workload: Workload, budget: int) -> tuple[int, str]:
    """The minimum and what sets it, for a budget that can hold the workload.

    Raises:
        BudgetError: it cannot.
    """
    minimum, limiter = minimum_budget(workload)
    if budget < minimum:
        parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in workload.fixed_parts if nbytes)
        raise BudgetError(
            f"budget {format_bytes(budget)} ({budget} bytes) cannot hold this model: the smallest that can is "
            f"{format_bytes(minimum)} ({minimum} bytes), set by {limiter}"
            + (f"; besides weights it pays for {parts}" if parts else ""),
            minimum=minimum,
            limiter=limiter,
        )
    return minimum, limiter


def _candidates(workload: Workload, room: int) -> Iterator[Candidate]:
    """Yield ``(resident, streamed, offsets in the window, window bytes)``, smallest window first."""
    blocks = workload.blocks
    if workload.weight_bytes <= room:
        yield frozenset(range(len(blocks))), (), [], 0
        return
    sizes = sorted({block.nbytes for block in blocks})
    windows = {_least_window(blocks), room // PAGE * PAGE}
    windows.update(size * k for size in sizes for k in (1, 2, 3) if len(sizes) <= 6)
    step = max(sizes[len(sizes) // 2], PAGE)
    while step < room:
        windows.add(step // PAGE * PAGE)
        step = max(step + PAGE, int(step * 1.4))
    seen = set()
    for window in sorted(w for w in windows if 0 < w <= room):
        forced = frozenset(i for i, block in enumerate(blocks) if block.nbytes > window)
        if sum(blocks[i].nbytes for i in forced) > room - window:
            continue
        for spread in _SPREADS:
            resident = spread(workload, room - window, forced)
            if (window, resident) in seen:
                continue
            seen.add((window, resident))
            streamed = tuple(i for i in range(len(blocks)) if i not in resident)
            places = place([blocks[i] for i in streamed], window)
            if places is None:  # fewer blocks may fit worse; where all of them fit, their places will do
                whole = place(blocks, window)
                places = [whole[i] for i in streamed] if whole is not None else None
            if places is not None:
                yield resident, streamed, places, window
            apart = place_apart([blocks[i] for i in streamed], window)
            if apart is not None:
                yield resident, streamed, apart, window


def _assemble(
    workload: Workload,
    machine: Machine,
    budget: int,
    least: tuple[int, str],
    candidate: Candidate,
    timing: Timing,
    cached: frozenset[int] | None = None,
) -> Plan:
    """The plan of a candidate; its cached set is that of ``host_set`` unless given."""
    resident, streamed, places, _ = candidate
    blocks = workload.blocks
    offsets = [0] * len(blocks)
    for i, offset in zip(streamed, places, strict=True):
        offsets[i] = offset
    used = max((offset + blocks[i].nbytes for i, offset in zip(streamed, places, strict=True)), default=0)
    at = used
    for i in sorted(resident):
        offsets[i] = at
        at += blocks[i].nbytes
    return Plan(
        budget=budget,
        minimum=least[0],
        limiter=least[1],
        fixed_bytes=workload.fixed_bytes,
        fixed_parts=workload.fixed_parts,
        blocks=blocks,
        resident=frozenset(resident),
        streamed=tuple(streamed),
        offsets=tuple(offsets),
        resident_bytes=at - used,
        window_bytes=used,
        timing=timing,
        machine=machine,
        cached=host_set(workload, machine, streamed) if cached is None else cached,
    )


def retime(plan: Plan, workload: Workload, machine: Machine, *, lower_bound: float | None = None) -> Plan:
    """The same decisions with the prediction made anew from better measurements.

    Args:
        lower_bound: seconds, if known; else it is made anew too, which takes some milliseconds.
    """
    workload = replace(workload, blocks=plan.blocks)  # a scheme may swap coarser
    places = [plan.offsets[i] for i in plan.streamed]
    timing = simulate(workload, machine, plan.resident, plan.streamed, places, cached=plan.cached)
    if lower_bound is None:
        lower_bound = latency_bound(workload, machine, (plan.budget - workload.fixed_bytes) // PAGE * PAGE)
    return replace(plan, timing=timing, machine=machine, lower_bound=lower_bound)
