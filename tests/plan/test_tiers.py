"""What stays in host memory: within its room, spread over the pass, and near the best that counting out finds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, combinations
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.plan import Block, Machine, Plan, Workload, make_plan, minimum_budget, simulate
from narrowboat.plan.layout import place
from narrowboat.plan.search import climb_cache
from narrowboat.plan.tiers import host_set

PAGE = 4096
DEVICE = Machine(PAGE * 1000.0, read_latency=0.0, copy_bandwidth=PAGE * 1e4, copy_latency=0.0, chunk=PAGE)


def chain(pages: list[int], milliseconds: list[float]) -> Workload:
    """One block per step."""
    blocks = tuple(Block(f"b{i}", n * PAGE, n * PAGE, ((i, i),)) for i, n in enumerate(pages))
    return Workload(blocks, tuple(ms * 1e-3 for ms in milliseconds))


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Up to ten blocks, a few of them used again or never."""
    pages = draw(st.lists(st.integers(1, 9), min_size=1, max_size=10))
    workload = chain(pages, draw(st.lists(st.floats(0, 9), min_size=len(pages) + 1, max_size=len(pages) + 1)))
    blocks = []
    for block in workload.blocks:
        uses = draw(st.sampled_from([1, 1, 1, 1, 2, 0]))
        blocks.append(replace(block, holds=(*block.holds, (len(pages), len(pages)))[:uses]))
    return replace(workload, blocks=tuple(blocks))


def total_of(workload: Workload, chosen: frozenset[int]) -> int:
    return sum(workload.blocks[i].nbytes for i in chosen)


@given(workloads(), st.integers(0, 90), st.integers(0, 1023))
def test_the_cached_blocks_are_streamed_ones_and_fit_the_room(workload: Workload, pages: int, bits: int) -> None:
    streamed = tuple(i for i in range(len(workload.blocks)) if bits >> i & 1)
    machine = replace(DEVICE, host_room=pages * PAGE + 1)
    cached = host_set(workload, machine, streamed)
    assert cached <= set(streamed)
    assert total_of(workload, cached) <= machine.host_room
    assert cached == host_set(workload, machine, list(streamed))
    if total_of(workload, frozenset(streamed)) <= machine.host_room:
        assert cached == set(streamed)
    # No block that is read would fit beside them.
    free = machine.host_room - total_of(workload, cached)
    assert all(workload.blocks[i].nbytes > free for i in streamed if i not in cached and workload.blocks[i].holds)


def test_without_a_device_or_without_room_nothing_is_cached() -> None:
    workload = chain([1, 2, 3], [1, 1, 1])
    assert not host_set(workload, Machine(1e9, host_room=1 << 30), (0, 1, 2))
    assert not host_set(workload, DEVICE, (0, 1, 2))


def test_a_block_used_several_times_in_a_pass_is_cached_before_the_others() -> None:
    workload = chain([4, 4, 4, 4, 4, 4], [1] * 7)
    blocks = list(workload.blocks)
    blocks[3] = replace(blocks[3], holds=((3, 3), (6, 6)))
    workload = replace(workload, blocks=tuple(blocks))
    assert host_set(workload, replace(DEVICE, host_room=4 * PAGE), range(6)) == {3}


def test_what_is_left_to_read_comes_due_evenly() -> None:
    workload = chain([10] * 24, [1.0] * 24)
    cached = host_set(workload, replace(DEVICE, host_room=80 * PAGE), range(24))
    read = list(accumulate(i not in cached for i in range(24)))
    assert len(cached) == 8
    assert all(abs(count - (i + 1) * 2 / 3) <= 1 for i, count in enumerate(read))


def test_only_streamed_blocks_are_spread_and_those_beside_resident_ones_are_read_while_these_compute() -> None:
    workload = chain([10] * 12, [1.0] * 12)
    streamed = (0, 1, 2, 3, 8, 9, 10, 11)
    assert host_set(workload, replace(DEVICE, host_room=40 * PAGE), streamed) == {0, 2, 9, 11}


def pace(workload: Workload, machine: Machine, offsets: list[int], passes: int = 20) -> float:
    """Milliseconds of a pass of many."""
    numbers = range(len(workload.blocks))
    took = [simulate(workload, machine, (), numbers, offsets, p + 1).latency for p in range(passes)]
    return sum(took) / passes * 1e3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=8), st.floats(0, 1))
def test_a_host_cache_is_never_worse_than_none_nor_better_than_one_for_everything(
    layers: list[tuple[int, int]], share: float
) -> None:
    workload = chain([pages for pages, _ in layers], [float(ms) for _, ms in layers])
    offsets = place(workload.blocks, 2 * max(block.nbytes for block in workload.blocks))
    assert offsets is not None
    none, some, every = (
        pace(workload, replace(DEVICE, host_room=room), offsets)
        for room in (0, int(workload.weight_bytes * share), workload.weight_bytes)
    )
    assert every - 1e-9 <= some <= none + 1e-9


def test_more_room_may_spread_the_cache_worse() -> None:
    # Another set, not a larger one: a page more lets layer 1 take the place of layer 0, whose read is the one waited
    # for. That is why the latency of a plan need not fall with every byte of host memory.
    workload, offsets = chain([2, 3, 4], [5, 4, 0]), [0, 2 * PAGE, 0]
    less, more = replace(DEVICE, host_room=2 * PAGE), replace(DEVICE, host_room=3 * PAGE)
    assert host_set(workload, less, range(3)) == {0}
    assert host_set(workload, more, range(3)) == {1}
    assert pace(workload, less, offsets) == pytest.approx(13.3)
    assert pace(workload, more, offsets) == pytest.approx(15.2)


def network_on_a_device(seed: int, *, from_idle: bool) -> tuple[Workload, Plan]:
    """Twelve unequal layers, storage from 0.8 to 3 times as slow as computing, copies ten times as fast."""
    chance = random.Random(seed)
    pages = [chance.randint(5, 60) for _ in range(12)]
    slower = chance.choice((0.8, 1.5, 3.0))
    share = [chance.uniform(0.3, 1) for _ in pages]
    seconds = tuple(part * sum(pages) * PAGE / 1e9 / slower / sum(share) for part in share)
    workload = replace(chain(pages, [0.0] * 12), step_seconds=seconds, from_idle=from_idle)
    room = int(sum(pages) * chance.choice((0.15, 0.3, 0.5))) * PAGE
    machine = Machine(1e9, 1e-5, copy_bandwidth=1e10, copy_latency=1e-6, host_room=room, chunk=4 * PAGE)
    least = minimum_budget(workload)[0]
    budget = least + int((workload.weight_bytes - least) * chance.choice((0.05, 0.15, 0.3)))
    return workload, make_plan(workload, machine, budget)


def full_caches(plan: Plan) -> Iterator[frozenset[int]]:
    """Every set of streamed blocks in host memory beside which no other fits."""
    sizes = {i: plan.blocks[i].nbytes for i in plan.streamed}
    for count in range(len(sizes) + 1):
        for chosen in combinations(sizes, count):
            free = plan.machine.host_room - sum(sizes[i] for i in chosen)
            if free >= 0 and all(sizes[i] > free for i in sizes if i not in chosen):
                yield frozenset(chosen)


@pytest.mark.parametrize(
    ("from_idle", "far", "far_on_average", "searched", "searched_on_average"),
    [(False, 0.20, 0.06, 0.03, 0.005), (True, 0.50, 0.12, 0.12, 0.015)],
)
def test_the_cached_set_is_near_the_best_there_is_and_searching_brings_it_closer(
    from_idle: bool, far: float, far_on_average: float, searched: float, searched_on_average: float
) -> None:
    by_rule, by_search = [], []
    for seed in range(20):
        workload, plan = network_on_a_device(seed, from_idle=from_idle)
        places = [plan.offsets[i] for i in plan.streamed]

        def seconds(cached: frozenset[int], workload: Workload = workload, plan: Plan = plan) -> float:
            spots = [plan.offsets[i] for i in plan.streamed]
            return simulate(
                workload, plan.machine, plan.resident, plan.streamed, spots, passes=3, cached=cached
            ).latency

        best = min(seconds(cached) for cached in full_caches(plan))
        by_rule.append(seconds(plan.cached) / best - 1)
        candidate = (plan.resident, plan.streamed, places, plan.window_bytes)
        cached, timing = climb_cache(workload, plan.machine, candidate, plan.timing, plan.lower_bound)
        assert total_of(workload, cached) <= plan.machine.host_room
        assert timing.latency == seconds(cached)
        by_search.append(timing.latency / best - 1)
    assert max(by_rule) <= far
    assert mean(by_rule) <= far_on_average
    assert max(by_search) <= searched
    assert mean(by_search) <= searched_on_average
