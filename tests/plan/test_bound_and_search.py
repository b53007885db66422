"""No plan beats the bound; a thorough plan reaches the best there is where that can be counted out."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import BudgetError, UsageError
from narrowboat.plan import Block, Machine, Workload, make_plan, minimum_budget, simulate
from narrowboat.plan.bound import latency_bound
from narrowboat.plan.layout import concurrent_sets
from narrowboat.plan.schemes import SCHEMES
from narrowboat.plan.search import ENOUGH, improves
from narrowboat.plan.tiers import host_set
from narrowboat.plan.timing import Timing

PAGE = 4096
MACHINE = Machine(bandwidth=PAGE * 1000.0, read_latency=0.0)  # a page takes a millisecond


@st.composite
def chains(draw: st.DrawFn, most: int = 4) -> Workload:
    """A few blocks of a few pages used one after the other, some of them twice."""
    count = draw(st.integers(2, most))
    pages = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    again = draw(st.integers(-1, count - 2))
    holds: list[list[tuple[int, int]]] = [[(i, i)] for i in range(count)]
    if again >= 0:
        holds[again].append((count, count))
    steps = draw(st.lists(st.integers(0, 5), min_size=count + 1, max_size=count + 1))
    blocks = tuple(
        Block(f"b{i}", n * PAGE, n * PAGE, tuple(h)) for i, (n, h) in enumerate(zip(pages, holds, strict=True))
    )
    return Workload(blocks, tuple(seconds * 1e-3 for seconds in steps), from_idle=draw(st.booleans()))


def best_by_counting(workload: Workload, room: int, machine: Machine = MACHINE) -> float:
    """The shortest pass of all resident sets, all places on the grid of pages and all sets in the host cache."""
    best = float("inf")
    numbers = range(len(workload.blocks))
    for count in range(len(workload.blocks) + 1):
        for chosen in combinations(numbers, count):
            window = room - sum(workload.blocks[i].nbytes for i in chosen)
            streamed = tuple(i for i in numbers if i not in chosen)
            blocks = [workload.blocks[i] for i in streamed]
            if window < 0 or any(block.nbytes > window for block in blocks):
                continue
            together = concurrent_sets(blocks)
            for places in product(*[range(0, window - block.nbytes + 1, PAGE) for block in blocks]):
                apart = all(
                    places[i] + blocks[i].nbytes <= places[j] or places[j] + blocks[j].nbytes <= places[i]
                    for i in range(len(blocks))
                    for j in together[i]
                )
                if not apart:
                    continue
                for cached in in_host_memory(workload, machine, streamed):
                    timing = simulate(workload, machine, chosen, streamed, places, passes=3, cached=cached)
                    best = min(best, timing.latency)
    return best


def in_host_memory(workload: Workload, machine: Machine, streamed: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every set of streamed blocks that fits in the host cache."""
    for count in range(len(streamed) + 1):
        for cached in combinations(streamed, count):
            if sum(workload.blocks[i].nbytes for i in cached) <= machine.host_room:
                yield cached


@st.composite
def devices(draw: st.DrawFn) -> Machine:
    """Storage of a page per millisecond, copies half to twenty times as fast, host memory for up to five pages."""
    return replace(
        MACHINE,
        copy_bandwidth=MACHINE.bandwidth * draw(st.sampled_from([0.5, 1.0, 2.0, 20.0])),
        copy_latency=draw(st.sampled_from([0.0, 1e-4])),
        host_room=draw(st.integers(0, 5)) * PAGE,
        chunk=draw(st.sampled_from([PAGE, 2 * PAGE])),
    )


@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(0, 5))
def test_a_thorough_plan_is_the_best_there_is_on_small_networks(workload: Workload, spare: int) -> None:
    budget = minimum_budget(workload)[0] + spare * PAGE
    plan = make_plan(workload, MACHINE, budget, thorough=True)
    assert plan.predicted_latency == pytest.approx(best_by_counting(workload, budget), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(chains(), st.integers(0, 5))
def test_no_plan_beats_the_bound(workload: Workload, spare: int) -> None:
    room = minimum_budget(workload)[0] + spare * PAGE
    assert latency_bound(workload, MACHINE, room) <= best_by_counting(workload, room) + 1e-9


@settings(max_examples=40, deadline=None)
@given(chains(), devices(), st.integers(0, 5))
def test_no_plan_on_a_device_beats_the_bound_whatever_it_keeps_in_host_memory(
    workload: Workload, machine: Machine, spare: int
) -> None:
    room = minimum_budget(workload)[0] + spare * PAGE
    assert latency_bound(workload, machine, room) <= best_by_counting(workload, room, machine) + 1e-9


@settings(max_examples=40, deadline=None)
@given(chains(), devices(), st.integers(0, 5))
def test_a_thorough_plan_on_a_device_is_the_best_there_is_on_small_networks(
    workload: Workload, machine: Machine, spare: int
) -> None:
    budget = minimum_budget(workload)[0] + spare * PAGE
    plan = make_plan(workload, machine, budget, thorough=True)
    best = best_by_counting(workload, budget, machine)
    assert best - 1e-9 <= plan.predicted_latency <= best * (1 + ENOUGH) + 1e-9
    places = [plan.offsets[i] for i in plan.streamed]
    found = simulate(workload, machine, plan.resident, plan.streamed, places, passes=3, cached=plan.cached)
    assert plan.timing == found
    assert plan.cached <= set(plan.streamed)
    assert plan.cached_bytes <= machine.host_room


def test_the_bound_on_a_device_is_that_of_the_channel_waited_for_longer() -> None:
    # Ten layers of ten pages in room for two of them; reading a layer takes 10 ms, computing it 1 ms.
    blocks = tuple(Block(f"b{i}", 10 * PAGE, 10 * PAGE, ((i, i),)) for i in range(10))
    workload, room = Workload(blocks, (1e-3,) * 10), 20 * PAGE
    one_stage = latency_bound(workload, MACHINE, room)
    device = replace(MACHINE, copy_bandwidth=MACHINE.bandwidth * 4, copy_latency=0.0)
    assert latency_bound(workload, device, room) == pytest.approx(one_stage)
    for layers in (1, 3):  # in host memory: so much less to read
        cached = replace(device, host_room=layers * 10 * PAGE)
        assert latency_bound(workload, cached, room) == pytest.approx(one_stage - layers * 0.010)
    everything = replace(device, host_room=100 * PAGE)
    copying = replace(MACHINE, bandwidth=device.copy_bandwidth)
    assert latency_bound(workload, everything, room) == pytest.approx(latency_bound(workload, copying, room))
    slow = replace(everything, copy_bandwidth=MACHINE.bandwidth / 2)
    assert latency_bound(workload, slow, room) > one_stage


def test_the_bound_sees_that_large_layers_cannot_be_read_beside_each_other() -> None:
    # Two layers of 9 pages in 12: both are read in every pass, not while either runs; one may begin a step earlier.
    blocks = tuple(Block(f"b{i}", n * PAGE, n * PAGE, ((i, i),)) for i, n in enumerate((9, 3, 9)))
    workload = Workload(blocks, (0.050, 0.001, 0.050))
    assert latency_bound(workload, MACHINE, 12 * PAGE) == pytest.approx(0.050 + 0.050 + 0.001 + 0.017)
    assert latency_bound(workload, MACHINE, 21 * PAGE) == pytest.approx(0.101)


def network(count: int, seed: int = 0) -> Workload:
    chance = random.Random(seed)
    pages = [chance.randint(20, 1200) for _ in range(count)]
    blocks = tuple(Block(f"b{i}", n * PAGE, n * PAGE, ((i, i),)) for i, n in enumerate(pages))
    return Workload(blocks, tuple(chance.uniform(1e-4, 4e-3) for _ in range(count)))


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_a_scheme_is_sound_and_never_better_than_the_best_plan(scheme: str, share: float) -> None:
    workload = network(40)
    machine = Machine(bandwidth=1e9)
    budget = int(workload.weight_bytes * share)
    plan = make_plan(workload, machine, budget, scheme=scheme)
    assert plan.scheme == scheme
    assert plan.arena_bytes <= budget
    together = concurrent_sets(plan.blocks)
    for i, block in enumerate(plan.blocks):
        for j in together[i]:
            other = plan.blocks[j]
            assert (
                plan.offsets[i] + block.nbytes <= plan.offsets[j] or plan.offsets[j] + other.nbytes <= plan.offsets[i]
            )
    best = make_plan(workload, machine, budget, thorough=True)
    assert best.lower_bound * (1 - 1e-9) <= best.predicted_latency <= plan.predicted_latency * (1 + ENOUGH)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_scheme_on_a_device_is_timed_with_its_host_cache_and_never_better_than_the_best_plan(
    scheme: str, share: float
) -> None:
    workload = network(40)
    machine = Machine(bandwidth=1e9, copy_bandwidth=8e9, host_room=int(workload.weight_bytes * share))
    budget = int(workload.weight_bytes * 0.4)
    plan = make_plan(workload, machine, budget, scheme=scheme)
    assert plan.cached == host_set(replace(workload, blocks=plan.blocks), machine, plan.streamed)
    assert bool(plan.cached) == bool(share)
    best = make_plan(workload, machine, budget, thorough=True)
    assert best.lower_bound * (1 - 1e-9) <= best.predicted_latency <= plan.predicted_latency * (1 + ENOUGH)


def test_swapnets_scheme_swaps_two_parts_at_a_time() -> None:
    workload = network(12)
    plan = make_plan(workload, Machine(bandwidth=1e9), workload.weight_bytes // 2, scheme="swapnet")
    parts = sorted({block.holds[0] for block in plan.blocks})
    assert len(parts) > 2
    sizes = [sum(b.nbytes for b in plan.blocks if b.holds[0] == part) for part in parts]
    assert all(a + b <= workload.weight_bytes // 2 for a, b in pairwise(sizes))
    assert not plan.resident


def test_swapnets_scheme_on_a_device_cuts_for_the_channel_that_takes_longer() -> None:
    workload = network(30)
    budget = workload.weight_bytes // 3

    def cut(machine: Machine) -> tuple[Block, ...]:
        return make_plan(workload, machine, budget, scheme="swapnet").blocks

    reading, copying = Machine(5e8, 1e-4), Machine(8e9, 1e-5)
    device = Machine(5e8, 1e-4, copy_bandwidth=8e9, copy_latency=1e-5)
    assert cut(device) == cut(reading)
    assert cut(replace(device, host_room=workload.weight_bytes)) == cut(copying) != cut(reading)


def test_as_fast_with_less_read_or_as_much_read_and_less_copied_is_better() -> None:
    timing = Timing(1.0, 0.0, {}, 100, 1.0, bytes_copied=100)
    assert improves(replace(timing, bytes_read=90, bytes_copied=200), timing)
    assert improves(replace(timing, bytes_copied=90), timing)
    assert not improves(timing, timing)
    assert not improves(replace(timing, bytes_read=110, bytes_copied=0), timing)
    assert not improves(replace(timing, latency=1.1, bytes_read=0), timing)


def test_swapnets_scheme_gives_no_two_parts_one_place_while_both_are_held() -> None:
    # Three layers of one step, then one of the next: parts of one layer each would put the third where the first is.
    blocks = tuple(Block(f"b{i}", PAGE, PAGE, ((i // 3, i // 3),)) for i in range(4))
    workload = Workload(blocks, (0.0, 0.0))
    assert len(set(make_plan(workload, MACHINE, 3 * PAGE, scheme="swapnet").offsets[:3])) == 3
    chance = random.Random(0)
    for _ in range(150):
        spans = [(first, min(first + chance.choice((0, 0, 1, 3)), 7)) for first in chance.choices(range(8), k=6)]
        blocks = tuple(Block(f"b{i}", chance.randint(1, 5) * PAGE, PAGE, (s,)) for i, s in enumerate(sorted(spans)))
        workload = Workload(blocks, tuple(chance.uniform(0, 1e-3) for _ in range(8)))
        try:
            budget = minimum_budget(workload)[0] + chance.randint(0, 8) * PAGE
            plan = make_plan(workload, MACHINE, budget, scheme="swapnet")
        except BudgetError:
            continue
        together = concurrent_sets(plan.blocks)
        for i, block in enumerate(plan.blocks):
            low, high = plan.offsets[i], plan.offsets[i] + block.nbytes
            assert all(plan.offsets[j] >= high or plan.offsets[j] + plan.blocks[j].nbytes <= low for j in together[i])


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_scheme_has_a_place_for_blocks_that_no_step_uses(scheme: str) -> None:
    blocks = (*(Block(f"b{i}", 2 * PAGE, 2 * PAGE, ((i, i),)) for i in range(4)), Block("odd", 3 * PAGE, PAGE, ()))
    plan = make_plan(Workload(blocks, (1e-3,) * 4), MACHINE, 4 * PAGE, scheme=scheme)
    assert plan.resident | set(plan.streamed) == set(range(5))
    assert plan.offsets[4] + 3 * PAGE <= plan.arena_bytes <= 4 * PAGE
    assert make_plan(Workload(blocks[4:], (1e-3,)), MACHINE, 3 * PAGE, scheme=scheme).arena_bytes <= 3 * PAGE


def test_an_unknown_scheme_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="swapnet"):
        make_plan(network(4), MACHINE, 1 << 30, scheme="nonsense")


def test_a_scheme_that_needs_more_says_so() -> None:
    blocks = (Block("a", 10 * PAGE, 10 * PAGE, ((0, 0),)), Block("b", 10 * PAGE, 10 * PAGE, ((1, 1),)))
    workload = Workload(blocks, (0.001, 0.001))
    with pytest.raises(BudgetError, match="swapnet"):
        make_plan(workload, MACHINE, 10 * PAGE, scheme="swapnet")


def test_the_same_arguments_give_the_same_plan() -> None:
    workload = network(60)
    budget = workload.weight_bytes // 3
    for machine in (Machine(5e8), Machine(5e8, copy_bandwidth=5e9, host_room=budget)):
        plan = make_plan(workload, machine, budget, thorough=True)
        assert plan == make_plan(workload, machine, budget, thorough=True)


def test_a_thousand_tensors_take_seconds_and_not_minutes() -> None:
    workload = network(1000)
    start = time.process_time()
    plan = make_plan(workload, Machine(bandwidth=1e9), workload.weight_bytes // 3, thorough=True)
    assert time.process_time() - start < 30  # about a second; the machines that test are busy ones
    assert plan.gap < 0.05


@settings(deadline=None, max_examples=60)
@given(workload=chains(6), odd=st.integers(0, PAGE - 1), more=st.integers(0, 12), thorough=st.booleans())
@pytest.mark.parametrize("scheme", ["best", *SCHEMES])
def test_every_block_begins_on_a_page_whatever_the_budget(
    scheme: str, workload: Workload, odd: int, more: int, thorough: bool
) -> None:
    budget = minimum_budget(workload)[0] + more * PAGE + odd
    try:
        plan = make_plan(workload, MACHINE, budget, scheme=scheme, thorough=thorough)
    except BudgetError:
        return
    assert all(offset % PAGE == 0 for offset in plan.offsets)
    assert all(plan.offsets[i] + plan.blocks[i].nbytes <= plan.weight_bytes for i in plan.streamed)
