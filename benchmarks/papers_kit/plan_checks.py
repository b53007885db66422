"""The planner against counting out, and the sharing of a budget: arithmetic, no network runs."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from typing import Any

from narrowboat.errors import BudgetError
from narrowboat.plan import Block, Machine, Workload, make_plan, minimum_budget
from narrowboat.tasks.allocate import floor_bytes
from narrowboat.tasks.task_set import TaskSet
from papers_kit.check import Bench, Measurement

_PAGE = 4096
_MACHINE = Machine(bandwidth=_PAGE * 1000.0, read_latency=0.0)  # a page takes a millisecond
_NETWORKS = 60
_SEED = 20261123


def planning(bench: Bench) -> Measurement:
    """SwapNet's partition against all partitions; ours against it; what a budget too small is answered with."""
    rng = random.Random(_SEED)
    gaps, ours, refused, explained = [], [], 0, True
    for _ in range(_NETWORKS):
        workload = _network(rng)
        least = minimum_budget(workload)[0]
        budget = least + rng.randint(0, 9) * _PAGE
        best = best_partition(workload, budget)
        try:
            theirs = make_plan(workload, _MACHINE, budget, scheme="swapnet").predicted_latency
        except BudgetError:
            refused += best is None
            explained = explained and best is None
            continue
        gaps.append(theirs / best - 1 if best else float("inf"))
        ours.append(make_plan(workload, _MACHINE, budget, thorough=True).predicted_latency / theirs)
        explained = explained and _explains(workload, least)
    return {
        "networks": _NETWORKS,
        "compared": len(gaps),
        "refused": refused,
        "worst_gap": max(gaps),
        "least_delay": max(gaps) < 0.01,
        "ours_over_theirs": sum(ours) / len(ours),
        "never_slower": max(ours) <= 1 + 1e-9,
        "refusals_explained": explained,
    }


def _network(rng: random.Random) -> Workload:
    count = rng.randint(3, 7)
    blocks = tuple(
        Block(f"b{i}", pages * _PAGE, pages * _PAGE, ((i, i),))
        for i, pages in enumerate(rng.randint(1, 4) for _ in range(count))
    )
    return Workload(blocks, tuple(rng.randint(0, 6) * 1e-3 for _ in range(count)), from_idle=True)


def best_partition(workload: Workload, room: int) -> float | None:
    """The least latency of all partitions into consecutive parts with two in memory, from a standstill; None if none.

    in_done[i] = max(in_done[i-1], ex_done[i-2]) + read[i]; ex_done[i] = max(ex_done[i-1], in_done[i]) + compute[i].
    """
    count = len(workload.blocks)
    sizes, computing = [b.nbytes for b in workload.blocks], list(workload.step_seconds)
    best: float | None = None
    for parts in range(1, count + 1):
        for cuts in combinations(range(1, count), parts - 1):
            ends = [0, *cuts, count]
            spans = [range(a, b) for a, b in pairwise(ends)]
            held = [sum(sizes[i] for i in span) for span in spans]
            if any(held[k] + (held[k + 1] if k + 1 < parts else 0) > room for k in range(parts)):
                continue
            into: list[float] = []
            done: list[float] = []
            for k, span in enumerate(spans):
                free = done[k - 2] if k >= 2 else 0.0
                into.append(max(into[-1] if into else 0.0, free) + held[k] / _MACHINE.bandwidth)
                done.append(max(done[-1] if done else 0.0, into[k]) + sum(computing[i] for i in span))
            best = done[-1] if best is None else min(best, done[-1])
    return best


def _explains(workload: Workload, least: int) -> bool:
    """A budget of one page less than the smallest is refused, with that number."""
    try:
        make_plan(workload, _MACHINE, least - _PAGE)
    except BudgetError as error:
        return error.minimum == least
    return False


def sharing(bench: Bench) -> Measurement:
    """SwapNet's two factors in our rule, on three described networks; and a rule of somebody else's plugged in."""
    tasks = [_described("a", 60, 20), _described("b", 30, 10), _described("c", 30, 3)]
    told = {"budget": "120MB", "tasks": tasks}
    shares = TaskSet.from_dict({**told, "allocation": "swapnet"}).allocation
    floors = {task.name: floor_bytes(task) for task in TaskSet.from_dict(told).costed}
    given = {name: share for name, share in shares.shares.items() if name}
    plugged = TaskSet.from_dict({**told, "allocation": "papers_kit.plugged:bare_floors"}).allocation
    urgent = TaskSet.from_dict(
        {**told, "allocation": "swapnet", "tasks": [tasks[0], {**tasks[1], "importance": 5}, tasks[2]]}
    ).allocation
    spare = {name: share - floors[name] for name, share in given.items()}
    return {
        "shares": ", ".join(f"{name} {share / 1e6:.1f} MB" for name, share in given.items()),
        "sums_to_budget": sum(shares.shares.values()) == 120_000_000,
        "each_has_its_floor": all(share >= floors[name] for name, share in given.items()),
        "larger_gets_more": spare["a"] > spare["b"],
        "more_gain_gets_more": spare["b"] > spare["c"],
        "urgent_gets_more": urgent.shares["b"] > shares.shares["b"],
        "another_rule_is_used": plugged.method == "bare floors",
    }


def _described(name: str, megabytes: int, load_ms: int) -> dict[str, Any]:
    block = {"load": f"{load_ms}ms", "compute": "5ms", "bytes": f"{megabytes // 6}MB"}
    return {"name": name, "period": "4s", "blocks": [block] * 6, "activation_bytes": 1_000_000}
