"""Plans over random networks: what they promise holds, whatever the network looks like."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import BudgetError
from narrowboat.plan import Block, Machine, Plan, Workload, make_plan, minimum_budget, simulate
from narrowboat.plan.layout import peak_held, place, place_apart
from narrowboat.plan.make import retime
from narrowboat.plan.result import summary

PAGE = 4096
MACHINE = Machine(bandwidth=1e8, read_latency=1e-5)
DEVICE = replace(MACHINE, copy_bandwidth=1e9)


@st.composite
def workloads(draw: st.DrawFn, most: int = 12) -> Workload:
    """Blocks in order of first use; most are used once, some again later, some over many steps, some never."""
    steps = draw(st.integers(1, 20))
    blocks = []
    for i in range(draw(st.integers(1, most))):
        count = draw(st.sampled_from([1, 1, 1, 1, 2, 3, 0]))
        cuts = sorted(draw(st.lists(st.integers(0, steps - 1), min_size=2 * count, max_size=2 * count)))
        holds = []
        for first, last in zip(cuts[::2], cuts[1::2], strict=True):
            if not holds or first > holds[-1][1] + 1:
                holds.append((first, min(last, first + draw(st.sampled_from([0, 0, 1, 3])))))
        nbytes = draw(st.integers(1, 60)) * PAGE
        blocks.append(Block(f"layer{i}", nbytes, nbytes - draw(st.integers(0, PAGE - 1)), tuple(holds)))
    blocks.sort(key=lambda block: block.holds[0][0] if block.holds else steps)
    seconds = draw(st.lists(st.floats(0, 0.01), min_size=steps, max_size=steps))
    return Workload(tuple(blocks), tuple(seconds), draw(st.integers(0, 10)) * PAGE)


def least(workload: Workload) -> int:
    return minimum_budget(workload)[0]


def held_together(a: Block, b: Block) -> bool:
    return any(f1 <= l2 and f2 <= l1 for f1, l1 in a.holds for f2, l2 in b.holds)


def assert_sound(plan: Plan, workload: Workload) -> None:
    """No two blocks that are needed at once share a byte, and everything lies within the budget."""
    assert set(plan.streamed) | plan.resident == set(range(len(workload.blocks)))
    assert not set(plan.streamed) & plan.resident
    assert plan.arena_bytes + plan.fixed_bytes <= plan.budget
    spans = [(plan.offsets[i], plan.offsets[i] + b.nbytes) for i, b in enumerate(workload.blocks)]
    for i, (low, high) in enumerate(spans):
        assert low % PAGE == 0
        inside_window = high <= plan.window_bytes
        assert inside_window if i in plan.streamed else plan.window_bytes <= low <= high <= plan.arena_bytes
        for j in range(i):
            apart = high <= spans[j][0] or spans[j][1] <= low
            if i in plan.resident or j in plan.resident or held_together(workload.blocks[i], workload.blocks[j]):
                assert apart


@given(workloads(), st.floats(0, 1.2))
@settings(max_examples=150, deadline=None)
def test_a_plan_exists_from_the_minimum_on_and_is_sound(workload: Workload, share: float) -> None:
    minimum = least(workload)
    total = workload.weight_bytes + workload.fixed_bytes
    budget = minimum + int(max(total - minimum, 0) * share)
    plan = make_plan(workload, MACHINE, budget)
    assert plan.minimum == minimum
    assert_sound(plan, workload)


def test_a_plan_exists_where_the_blocks_left_to_stream_fit_worse_than_all_of_them() -> None:
    chance = random.Random(1)
    for _ in range(250):
        count = chance.randint(15, 40)
        blocks = [
            Block(f"layer{i}", chance.randint(10, 500) * PAGE, PAGE, ((2 * i, 2 * i + chance.choice([0, 0, 1, 2])),))
            for i in range(count)
        ]
        workload = Workload(tuple(blocks), (1e-4,) * (2 * count + 2))
        minimum = least(workload)
        for share in (0.05, 0.125, 0.25):
            assert_sound(
                make_plan(workload, MACHINE, minimum + int((workload.weight_bytes - minimum) * share)), workload
            )


@given(workloads())
@settings(max_examples=100, deadline=None)
def test_the_minimum_is_feasible_and_one_byte_less_is_refused_with_it(workload: Workload) -> None:
    minimum = least(workload)
    assert_sound(make_plan(workload, MACHINE, minimum), workload)
    with pytest.raises(BudgetError) as refused:
        make_plan(workload, MACHINE, minimum - 1)
    assert refused.value.minimum == minimum
    assert refused.value.limiter in str(refused.value)


@given(workloads())
@settings(max_examples=100, deadline=None)
def test_the_minimum_holds_what_is_needed_at_once_and_never_more_than_everything(workload: Workload) -> None:
    needed, step = peak_held(workload.blocks)
    assert needed == sum(b.nbytes for b in workload.blocks if any(f <= step <= s for f, s in b.holds))
    assert needed <= least(workload) - workload.fixed_bytes <= workload.weight_bytes


@given(workloads())
@settings(max_examples=100, deadline=None)
def test_with_room_for_everything_everything_stays_and_nothing_is_read(workload: Workload) -> None:
    plan = make_plan(workload, MACHINE, max(workload.weight_bytes + workload.fixed_bytes, 1))
    assert not plan.streamed
    assert plan.timing.bytes_read == 0
    assert plan.predicted_latency == pytest.approx(sum(workload.step_seconds))


@given(workloads(), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_prediction_is_never_below_computing_or_reading(workload: Workload, share: float) -> None:
    minimum = least(workload)
    plan = make_plan(
        workload, MACHINE, minimum + int((workload.weight_bytes + workload.fixed_bytes - minimum) * share)
    )
    assert plan.predicted_latency >= plan.lower_bound * (1 - 1e-9) - 1e-12
    assert plan.predicted_latency == pytest.approx(plan.timing.compute + plan.timing.stall)
    assert plan.timing.bytes_read <= sum(b.read_bytes * len(b.holds) for b in workload.blocks)


NETWORKS = {
    "equal layers": [(256, 1.0)] * 24,
    "convolutional": [(10 * 2 ** (i // 4), 4 / (1 + i // 4)) for i in range(24)],
    "alternating": [(400, 1.5) if i % 2 else (100, 0.2) for i in range(30)],
    "one large layer": [(20, 3), (40, 3), (80, 2), (160, 2), (300, 2), (600, 1), (600, 1), (4000, 1), (1000, 0.3)],
    "bound by reading": [(256, 0.2)] * 24,
}


@pytest.mark.parametrize("network", NETWORKS)
def test_more_budget_is_not_slower(network: str) -> None:
    blocks = tuple(Block(f"layer{i}", n * PAGE, n * PAGE, ((i, i),)) for i, (n, _) in enumerate(NETWORKS[network]))
    workload = Workload(blocks, tuple(milliseconds * 1e-3 for _, milliseconds in NETWORKS[network]))
    minimum, total = least(workload), workload.weight_bytes
    machine = Machine(bandwidth=1e9, read_latency=1e-5)
    latencies = [
        make_plan(workload, machine, minimum + (total - minimum) * i // 20).predicted_latency for i in range(21)
    ]
    for i, latency in enumerate(latencies):
        # Windows and resident sets are tried, not enumerated, and a window has to earn half a percent.
        assert latency <= min(latencies[: i + 1]) * 1.1
    assert latencies[-1] == pytest.approx(sum(workload.step_seconds))


@pytest.mark.parametrize("lay", [place, place_apart])
@given(workload=workloads(), pages=st.integers(1, 200))
@settings(max_examples=150, deadline=None)
def test_blocks_are_placed_apart_within_the_window_or_not_at_all(lay: Any, workload: Workload, pages: int) -> None:
    offsets = lay(workload.blocks, pages * PAGE)
    if offsets is None:
        return
    for i, block in enumerate(workload.blocks):
        assert 0 <= offsets[i] <= pages * PAGE - block.nbytes
        for j, other in enumerate(workload.blocks):
            meet = i != j and offsets[i] < offsets[j] + other.nbytes and offsets[j] < offsets[i] + block.nbytes
            assert not (meet and held_together(block, other))


def test_a_layer_that_takes_most_of_the_window_leaves_the_others_a_ring_of_their_own() -> None:
    sizes = [2, 2, 2, 20, 6]  # the last does not fit beside the large one, and shares its place
    blocks = [Block(f"b{i}", n * PAGE, n * PAGE, ((i, i),)) for i, n in enumerate(sizes)]
    offsets = place_apart(blocks, 24 * PAGE)
    assert offsets == [20 * PAGE, 22 * PAGE, 20 * PAGE, 0, 0]
    assert place_apart(blocks[:3], 24 * PAGE) is None


def test_a_network_of_equal_layers_keeps_what_the_window_does_not_need() -> None:
    blocks = tuple(Block(f"layer{i}", 100 * PAGE, 100 * PAGE, ((i, i),)) for i in range(20))
    workload = Workload(blocks, (0.01,) * 20)
    machine = Machine(bandwidth=100 * PAGE / 0.005, read_latency=0.0)
    plan = make_plan(workload, machine, 1000 * PAGE)
    assert plan.timing.stall == pytest.approx(0, abs=1e-9)
    assert plan.window_bytes <= 300 * PAGE
    assert plan.resident_bytes + plan.window_bytes == 1000 * PAGE


def test_places_stay_on_pages_whatever_the_budget() -> None:
    blocks = tuple(Block(f"b{i}", (3 + i % 5) * PAGE, (3 + i % 5) * PAGE, ((i, i),)) for i in range(12))
    workload = Workload(blocks, (1e-3,) * 12, 100)
    for budget in range(least(workload) + 1, least(workload) + 12 * PAGE, 5 * PAGE // 2 + 77):
        for scheme in ("best", "swapnet"):
            try:
                plan = make_plan(workload, Machine(1e7), budget, scheme=scheme, thorough=True)
            except BudgetError:
                continue
            assert all(offset % PAGE == 0 for offset in plan.offsets)


def test_the_explanation_says_where_the_budget_goes_and_what_limits_it() -> None:
    blocks = tuple(Block(f"layer{i}", (50 + i) * PAGE, 50 * PAGE, ((i, i),)) for i in range(9))
    workload = Workload(blocks, (0.0001,) * 9, 3 * PAGE, (("buffers", PAGE), ("activations", 2 * PAGE)))
    plan = make_plan(workload, MACHINE, 200 * PAGE)
    text = str(plan)
    for word in ("budget", "resident", "window", "buffers", "activations", "layer8", "predicted", "waits most"):
        assert word in text
    told = summary(plan)
    assert told["budget_bytes"] == 200 * PAGE
    assert told["min_budget_bytes"] == plan.minimum == 58 * PAGE + 3 * PAGE
    assert told["bytes_read_per_pass"] == plan.timing.bytes_read


@given(workloads(), st.floats(0, 1.2), st.integers(0, 400), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_plan_on_a_device_is_sound_and_caches_what_it_streams(
    workload: Workload, share: float, pages: int, thorough: bool
) -> None:
    minimum, total = least(workload), workload.weight_bytes + workload.fixed_bytes
    machine = replace(DEVICE, host_room=pages * PAGE)
    plan = make_plan(workload, machine, minimum + int(max(total - minimum, 0) * share), thorough=thorough)
    assert_sound(plan, workload)
    assert plan.cached <= set(plan.streamed)
    assert plan.cached_bytes == sum(workload.blocks[i].nbytes for i in plan.cached) <= machine.host_room
    assert plan.predicted_latency >= plan.lower_bound * (1 - 1e-9) - 1e-12
    assert plan.timing.compute == pytest.approx(sum(workload.step_seconds))
    places = [plan.offsets[i] for i in plan.streamed]
    found = simulate(workload, machine, plan.resident, plan.streamed, places, passes=3, cached=plan.cached)
    assert plan.timing == found
    if plan.cached == set(plan.streamed):
        assert plan.timing.bytes_read == 0


@pytest.mark.parametrize("network", NETWORKS)
def test_more_host_memory_is_hardly_slower(network: str) -> None:
    blocks = tuple(Block(f"layer{i}", n * PAGE, n * PAGE, ((i, i),)) for i, (n, _) in enumerate(NETWORKS[network]))
    workload = Workload(blocks, tuple(milliseconds * 1e-3 for _, milliseconds in NETWORKS[network]))
    total = workload.weight_bytes
    budget = max(least(workload), total // 4)
    machine = Machine(bandwidth=1e9, read_latency=1e-5, copy_bandwidth=8e9)
    rooms = [total * i // 20 for i in range(21)]
    latencies = [
        make_plan(workload, replace(machine, host_room=room), budget, thorough=True).predicted_latency
        for room in rooms
    ]
    for i, latency in enumerate(latencies):
        assert latency <= min(latencies[: i + 1]) * 1.05  # sets are tried, not enumerated
    copying = Machine(bandwidth=8e9, read_latency=1e-5)
    assert latencies[-1] == pytest.approx(make_plan(workload, copying, budget, thorough=True).predicted_latency)


def test_a_plan_timed_anew_keeps_its_host_cache() -> None:
    workload = Workload(tuple(Block(f"layer{i}", 50 * PAGE, 50 * PAGE, ((i, i),)) for i in range(9)), (1e-3,) * 9)
    plan = make_plan(workload, replace(DEVICE, host_room=150 * PAGE), 150 * PAGE)
    assert len(plan.cached) == 3
    for machine in (plan.machine, replace(DEVICE, bandwidth=1e7, host_room=0)):
        again = retime(plan, workload, machine)
        assert again.cached == plan.cached
        assert again.timing.bytes_read == plan.timing.bytes_read
    assert again.predicted_latency > plan.predicted_latency


def test_the_explanation_of_a_plan_on_a_device_has_its_host_cache_and_both_channels() -> None:
    workload = Workload(tuple(Block(f"layer{i}", 256 * PAGE, 256 * PAGE, ((i, i),)) for i in range(9)), (1e-3,) * 9)
    plan = make_plan(workload, replace(DEVICE, host_room=800 * PAGE), 600 * PAGE)
    lines = str(plan).splitlines()
    assert "host cache    3.00 MiB in 3 blocks" in lines
    assert any(line.startswith("reads ") and "at 0.10 GB/s" in line for line in lines)
    assert any(line.startswith("copies ") and "at 1.00 GB/s to the device" in line for line in lines)
    told = summary(plan)
    assert told["host_cache_bytes"] == plan.cached_bytes == 3 << 20
    assert told["host_cached_blocks"] == 3
    assert told["bytes_copied_per_pass"] == plan.timing.bytes_copied > plan.timing.bytes_read
    assert told["copy_bandwidth_bytes_per_s"] == 1e9
    plain = str(make_plan(workload, MACHINE, 600 * PAGE))
    assert "host cache" not in plain
    assert "copies" not in plain


def test_planning_imports_no_torch() -> None:
    program = "import sys, narrowboat.plan; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
