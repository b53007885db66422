"""The timing recurrence against worked examples and against a simulation clock tick by clock tick."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.plan import Block, Machine, Workload, simulate
from narrowboat.plan.layout import place
from narrowboat.plan.timing import Lead

PAGE = 4096
TICKS = Machine(bandwidth=1.0, read_latency=0.0)  # a byte per tick: reads take as many ticks as they have bytes


def chain(loads: Sequence[int], computes: Sequence[int]) -> Workload:
    """One block per step, all of one size in memory; loads and computes in ticks."""
    blocks = tuple(Block(f"layer{i}", PAGE, load, ((i, i),)) for i, load in enumerate(loads))
    return Workload(blocks, tuple(map(float, computes)))


def in_slots(workload: Workload, slots: int, passes: int) -> float:
    """Latency of the last of ``passes`` passes with a ring of equal slots."""
    count = len(workload.blocks)
    offsets = [i % slots * PAGE for i in range(count)]
    return simulate(workload, TICKS, (), range(count), offsets, passes).latency


def recurrence(loads: Sequence[int], computes: Sequence[int], slots: int) -> int:
    """Makespan of one pass from idle: f_load(j) = max(f_load(j-1), f_cmp(j-m)) + L_j, and so on."""
    loaded, computed = [0], [0]
    for j, (load, compute) in enumerate(zip(loads, computes, strict=True), 1):
        loaded.append(max(loaded[-1], computed[max(j - slots, 0)]) + load)
        computed.append(max(loaded[-1], computed[-1]) + compute)
    return computed[-1]


@pytest.mark.parametrize(("slots", "makespan"), [(1, 60), (2, 46), (3, 36)])
def test_the_worked_example_of_four_layers(slots: int, makespan: int) -> None:
    loads, computes = [6, 5, 7, 12], [12, 11, 2, 5]
    assert recurrence(loads, computes, slots) == makespan
    assert in_slots(chain(loads, computes), slots, passes=1) == makespan


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=10), st.integers(1, 5))
def test_equal_slots_give_the_recurrence(layers: list[tuple[int, int]], slots: int) -> None:
    loads, computes = zip(*layers, strict=True)
    if slots >= len(layers):
        return
    assert in_slots(chain(loads, computes), slots, passes=1) == recurrence(loads, computes, slots)


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=2, max_size=10))
def test_two_slots_give_the_closed_form(layers: list[tuple[int, int]]) -> None:
    loads, computes = zip(*layers, strict=True)
    if len(layers) == 2:
        return
    closed = loads[0] + sum(map(max, computes, loads[1:])) + computes[-1]
    assert in_slots(chain(loads, computes), 2, passes=1) == closed


def tick_by_tick(workload: Workload, offsets: Sequence[int], passes: int) -> list[int]:
    """The time at which each pass ends, on a clock; reads take ``read_bytes`` ticks, steps their seconds.

    One reader takes the holds of all passes in order of use. A block that is still in is not read again; another may
    be read as soon as no block whose addresses it takes has a hold outstanding that comes before.
    """
    blocks = workload.blocks
    order = sorted((first, last, k) for k, block in enumerate(blocks) for first, last in block.holds)
    uses = [(number, first, last, k) for number in range(passes) for first, last, k in order]
    meets = [
        [
            j
            for j, other in enumerate(blocks)
            if j != i and offsets[i] < offsets[j] + other.nbytes and offsets[j] < offsets[i] + block.nbytes
        ]
        for i, block in enumerate(blocks)
    ]
    inside: set[int] = set()
    ready: set[int] = set()  # uses whose bytes are in
    upcoming, reading, read_ends = 0, -1, 0
    number, step, running, step_ends = 0, 0, False, 0
    now = 0
    ends: list[int] = []

    def over(use: tuple[int, int, int, int]) -> bool:
        return (use[0], use[2]) < (number, step)

    while len(ends) < passes:
        moved = True
        while moved:
            moved = False
            if running and step_ends <= now:
                running, moved = False, True
                step += 1
                if step == len(workload.step_seconds):
                    ends.append(now)
                    number, step = number + 1, 0
                    if len(ends) == passes:
                        break
            if reading >= 0 and read_ends <= now:
                inside.add(uses[reading][3])
                ready.add(reading)
                reading, moved = -1, True
            if reading < 0 and upcoming < len(uses):
                k = uses[upcoming][3]
                if k in inside:
                    ready.add(upcoming)
                    upcoming, moved = upcoming + 1, True
                elif not any(uses[u][3] in meets[k] and not over(uses[u]) for u in range(upcoming)):
                    inside -= set(meets[k])
                    reading, read_ends = upcoming, now + blocks[k].read_bytes
                    upcoming, moved = upcoming + 1, True
            if not running and all(
                u in ready for u, use in enumerate(uses) if use[0] == number and use[1] <= step <= use[2]
            ):
                running, step_ends, moved = True, now + int(workload.step_seconds[step]), True
        now += 1
    return ends


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[Workload, list[int]]:
    steps = draw(st.integers(1, 6))
    blocks = []
    for i in range(draw(st.integers(1, 5))):
        first = draw(st.integers(0, steps - 1))
        last = min(first + draw(st.sampled_from([0, 0, 1, 2])), steps - 1)
        holds = [(first, last)]
        again = last + 2
        if again < steps and draw(st.booleans()):
            holds.append((again, again))
        blocks.append(Block(f"layer{i}", draw(st.integers(1, 3)) * PAGE, draw(st.integers(1, 9)), tuple(holds)))
    blocks.sort(key=lambda block: block.holds)
    seconds = draw(st.lists(st.integers(0, 9), min_size=steps, max_size=steps))
    workload = Workload(tuple(blocks), tuple(map(float, seconds)))
    for pages in range(draw(st.integers(1, 9)), 16):
        offsets = place(blocks, pages * PAGE)
        if offsets is not None:
            return workload, offsets
    raise AssertionError("fifteen pages hold five blocks of three")


@given(small_cases(), st.integers(1, 4))
@settings(max_examples=300, deadline=None)
def test_every_pass_takes_as_long_as_on_the_clock(case: tuple[Workload, list[int]], passes: int) -> None:
    workload, offsets = case
    ends = tick_by_tick(workload, offsets, passes)
    timing = simulate(workload, TICKS, (), range(len(workload.blocks)), offsets, passes)
    assert timing.latency == ends[-1] - (ends[-2] if passes > 1 else 0)
    assert timing.stall == timing.latency - sum(workload.step_seconds)
    assert sum(timing.stall_by_block.values()) == pytest.approx(timing.stall)


@given(small_cases())
def test_a_steady_pass_is_never_quicker_than_computing_or_reading(case: tuple[Workload, list[int]]) -> None:
    workload, offsets = case
    timing = simulate(workload, TICKS, (), range(len(workload.blocks)), offsets, passes=12)
    assert timing.latency >= timing.compute == sum(workload.step_seconds)
    ends = tick_by_tick(workload, offsets, 12)
    # Over many passes the one reader cannot bring in more than a byte per tick.
    assert ends[-1] >= timing.bytes_read * 10


def test_a_step_takes_longer_for_as_long_as_it_is_read_beside_it() -> None:
    # Two slots, three layers: each step of 10 has 4 of reading beside it, and goes on at two thirds of its pace then.
    workload = chain([4, 4, 4], [10, 10, 10])
    slow = Machine(bandwidth=1.0, read_latency=0.0, contention=0.5)
    timing = simulate(workload, slow, (), [0, 1, 2], [0, PAGE, 2 * PAGE], passes=6)
    assert timing.bytes_read == 0
    timing = simulate(workload, slow, (), [0, 1, 2], [0, PAGE, 0], passes=6)
    assert timing.compute == pytest.approx(30 + timing.beside_reading / 3)
    assert timing.beside_reading > 0


@given(small_cases(), st.floats(0, 1), st.integers(1, 4))
@settings(deadline=None)
def test_what_reading_costs_the_computing_is_its_share_of_the_time(
    case: tuple[Workload, list[int]], contention: float, passes: int
) -> None:
    workload, offsets = case
    machine = Machine(bandwidth=1.0, read_latency=0.0, contention=contention)
    timing = simulate(workload, machine, (), range(len(workload.blocks)), offsets, passes)
    cost = timing.beside_reading * contention / (1 + contention)
    assert timing.compute == pytest.approx(sum(workload.step_seconds) + cost)
    by_step = replace(workload, busy_seconds=tuple(s * (1 + contention) for s in workload.step_seconds))
    assert simulate(by_step, TICKS, (), range(len(workload.blocks)), offsets, passes).latency == pytest.approx(
        timing.latency
    )


def test_overheads_count_for_every_step_and_every_read() -> None:
    workload = chain([4, 4], [10, 10])
    machine = Machine(bandwidth=2.0, read_latency=3.0, step_overhead=1.0)
    timing = simulate(workload, machine, (), [0, 1], [0, 0], passes=1)
    assert timing.compute == 22.0
    assert timing.latency == 22.0 + 2 * (4 / 2.0 + 3.0)


def test_nothing_streamed_is_nothing_waited_for() -> None:
    timing = simulate(chain([4, 4], [10, 10]), TICKS, {0, 1}, [], [])
    assert (timing.latency, timing.stall, timing.bytes_read) == (20.0, 0.0, 0)


@pytest.mark.parametrize(("slots", "latency"), [(1, 32), (2, 18), (3, 12)])
def test_a_pass_after_a_pause_begins_with_the_window_full(slots: int, latency: int) -> None:
    # Two slots: layer 2 is read when layer 0 has been computed, from 4 to 14. One slot: each waits for its own read.
    workload = replace(chain([10, 10, 10], [4, 4, 4]), from_idle=True)
    for passes in (2, 3, 5):
        assert in_slots(workload, slots, passes) == latency


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=10), st.integers(1, 5))
def test_a_pass_after_a_pause_is_the_recurrence_with_the_first_slots_full(
    layers: list[tuple[int, int]], slots: int
) -> None:
    loads, computes = zip(*layers, strict=True)
    there = [0 if i < slots else load for i, load in enumerate(loads)]
    loaded, computed = [0], [0]
    for j, (load, compute) in enumerate(zip(there, computes, strict=True), 1):
        # A slot is read into from the end of the step before; those that are full were read before it began.
        loaded.append(max(loaded[-1], computed[max(j - slots, 0)]) + load if load else 0)
        computed.append(max(loaded[-1], computed[-1]) + compute)
    workload = replace(chain(loads, computes), from_idle=True)
    assert in_slots(workload, slots, passes=3) == computed[-1]
    assert in_slots(workload, slots, passes=3) <= in_slots(replace(workload, from_idle=False), slots, passes=3)


def on_two_channels(
    workload: Workload, machine: Machine, offsets: Sequence[int], cached: Collection[int], passes: int
) -> list[int]:
    """How long each pass takes on a clock, with a queue before each channel; every duration is a number of ticks.

    A block is submitted to both queues when it is its turn and its place is free. The copy of one that is read ends
    when it has had its ticks and those of the last chunk have gone by since the end of the read.
    """
    blocks = workload.blocks
    uses = [
        (number, first, last, k)
        for number in range(passes)
        for first, last, k in sorted((first, last, k) for k, b in enumerate(blocks) for first, last in b.holds)
    ]
    to_read, to_copy, read_at = deque[int](), deque[int](), dict[int, int]()
    placed, arrived = set[int](), set[int]()
    reading, copying, running = -1, -1, False
    read_ends = copy_ends = step_ends = upcoming = number = step = now = began = 0
    took: list[int] = []

    def meet(i: int, j: int) -> bool:
        return offsets[i] < offsets[j] + blocks[j].nbytes and offsets[j] < offsets[i] + blocks[i].nbytes

    def taken(k: int) -> bool:
        """Whether a use that comes before is outstanding of a block where block ``k`` goes."""
        return any(meet(k, use[3]) and (use[0], use[2]) >= (number, step) for use in uses[:upcoming])

    def copied(nbytes: int) -> int:
        return int(nbytes / machine.copy_bandwidth + machine.copy_latency)

    while len(took) < passes:
        before = None
        while before != (before := (upcoming, reading, copying, running, number, step, len(arrived))):
            if running and step_ends <= now:
                running, step = False, step + 1
                if step == len(workload.step_seconds):
                    took.append(now - began)
                    number, step, began = number + 1, 0, now
            while upcoming < len(uses) and (uses[upcoming][3] in placed or not taken(uses[upcoming][3])):
                k = uses[upcoming][3]
                if k not in placed:
                    for other in [other for other in placed if meet(k, other)]:
                        placed.discard(other)
                        arrived.discard(other)
                    placed.add(k)
                    to_copy.append(k)
                    read_at.pop(k, None)
                    if k not in cached:
                        to_read.append(k)
                upcoming += 1
            if reading >= 0 and read_ends <= now:
                read_at[reading], reading = now, -1
            if reading < 0 and to_read:
                reading = to_read.popleft()
                read_ends = now + int(blocks[reading].read_bytes / machine.bandwidth + machine.read_latency)
            if copying >= 0 and copy_ends <= now:
                last_chunk = copied(min(blocks[copying].nbytes, machine.chunk))
                if copying in cached or (copying in read_at and read_at[copying] + last_chunk <= now):
                    arrived.add(copying)
                    copying = -1
            if copying < 0 and to_copy:
                copying = to_copy.popleft()
                copy_ends = now + copied(blocks[copying].nbytes)
            if number == passes:
                break
            if workload.from_idle and step == 0 and not running:
                if copying >= 0:
                    continue
                began = now
            if not running and all(
                u < upcoming and use[3] in arrived
                for u, use in enumerate(uses)
                if use[0] == number and use[1] <= step <= use[2]
            ):
                running, step_ends = True, now + int(workload.step_seconds[step])
        now += 1
    return took


@st.composite
def device_ticks(draw: st.DrawFn) -> Machine:
    """Reads of a byte per tick, copies of a page in one to four ticks: either channel may be the slower one."""
    return Machine(
        bandwidth=1.0,
        read_latency=float(draw(st.integers(0, 1))),
        copy_bandwidth=PAGE / draw(st.sampled_from([1, 2, 4])),
        copy_latency=float(draw(st.integers(0, 2))),
        chunk=draw(st.sampled_from([PAGE, 2 * PAGE, 1 << 20])),
    )


def chosen(workload: Workload, bits: int) -> frozenset[int]:
    """The blocks numbered by the ones of ``bits``."""
    return frozenset(i for i in range(len(workload.blocks)) if bits >> i & 1)


def each_pass(
    workload: Workload, machine: Machine, offsets: Sequence[int], cached: Collection[int], passes: int
) -> list[float]:
    """Seconds that each of the first ``passes`` passes takes."""
    numbers = range(len(workload.blocks))
    return [simulate(workload, machine, (), numbers, offsets, p + 1, cached=cached).latency for p in range(passes)]


def ends(
    workload: Workload, machine: Machine, offsets: Sequence[int], cached: Collection[int], passes: int = 6
) -> list[float]:
    """When each pass ends; after pauses, which end in a like state, how long each takes."""
    took = each_pass(workload, machine, offsets, cached, passes)
    return took if workload.from_idle else list(accumulate(took))


@given(small_cases(), device_ticks(), st.integers(0, 31), st.booleans())
@settings(max_examples=300, deadline=None)
def test_on_a_device_every_pass_takes_as_long_as_on_the_clock_of_two_channels(
    case: tuple[Workload, list[int]], machine: Machine, bits: int, from_idle: bool
) -> None:
    workload, offsets = replace(case[0], from_idle=from_idle), case[1]
    cached = chosen(workload, bits)
    assert each_pass(workload, machine, offsets, cached, 4) == on_two_channels(workload, machine, offsets, cached, 4)


@given(small_cases(), device_ticks(), st.integers(0, 31))
@settings(deadline=None)
def test_what_is_cached_is_copied_and_not_read(case: tuple[Workload, list[int]], machine: Machine, bits: int) -> None:
    workload, offsets = case
    numbers = range(len(workload.blocks))
    one_stage = simulate(workload, replace(machine, copy_bandwidth=0.0), (), numbers, offsets)
    none = simulate(workload, machine, (), numbers, offsets, cached=())
    some = simulate(workload, machine, (), numbers, offsets, cached=chosen(workload, bits))
    every = simulate(workload, machine, (), numbers, offsets, cached=numbers)
    assert none.bytes_read == one_stage.bytes_read >= some.bytes_read >= every.bytes_read == 0
    assert one_stage.bytes_copied == 0
    assert none.bytes_copied == some.bytes_copied == every.bytes_copied


@given(small_cases(), st.integers(0, 3), st.booleans())
@settings(deadline=None)
def test_copying_in_no_time_is_one_stage_and_its_latency_adds_itself_per_block(
    case: tuple[Workload, list[int]], latency: int, from_idle: bool
) -> None:
    workload, offsets = replace(case[0], from_idle=from_idle), case[1]
    quick = replace(TICKS, copy_bandwidth=1e30, copy_latency=0.0)
    alone = ends(workload, TICKS, offsets, ())
    assert ends(workload, quick, offsets, ()) == pytest.approx(alone)
    late = ends(workload, replace(quick, copy_latency=float(latency)), offsets, ())
    reads = sum(len(block.holds) for block in workload.blocks)
    for number, (found, least) in enumerate(zip(late, alone, strict=True), 1):
        assert least - 1e-9 <= found <= least + latency * reads * number + 1e-9


@given(small_cases(), device_ticks(), st.booleans())
@settings(deadline=None)
def test_with_everything_in_host_memory_copying_is_the_one_stage(
    case: tuple[Workload, list[int]], machine: Machine, from_idle: bool
) -> None:
    workload, offsets = replace(case[0], from_idle=from_idle), case[1]
    numbers = range(len(workload.blocks))
    whole = replace(workload, blocks=tuple(replace(block, read_bytes=block.nbytes) for block in workload.blocks))
    copying = Machine(machine.copy_bandwidth, machine.copy_latency)
    seen, seen_alone = Lead(), Lead()
    cached = simulate(workload, replace(machine, host_room=workload.weight_bytes), (), numbers, offsets, lead=seen)
    alone = simulate(whole, copying, (), numbers, offsets, lead=seen_alone)
    assert replace(cached, bytes_read=cached.bytes_copied, bytes_copied=0) == alone
    assert seen == seen_alone


@given(small_cases(), device_ticks(), st.integers(0, 31), st.booleans(), st.floats(1, 20), st.floats(1, 20))
@settings(deadline=None)
def test_with_faster_channels_no_pass_ends_later(
    case: tuple[Workload, list[int]], machine: Machine, bits: int, from_idle: bool, read: float, copy: float
) -> None:
    # What is read after which step does not depend on how long things take, so that every event is a maximum of sums
    # of durations. One pass alone may take longer in the middle of many, where the one before it gained more.
    workload, offsets = replace(case[0], from_idle=from_idle), case[1]
    cached = chosen(workload, bits)
    slow = ends(workload, machine, offsets, cached)
    for faster in (
        replace(machine, bandwidth=machine.bandwidth * read),
        replace(machine, copy_bandwidth=machine.copy_bandwidth * copy),
    ):
        found = ends(workload, faster, offsets, cached)
        assert all(a <= b + 1e-9 for a, b in zip(found, slow, strict=True))


@given(small_cases(), device_ticks(), st.integers(0, 31), st.integers(0, 31), st.booleans())
@settings(deadline=None)
def test_with_more_blocks_in_host_memory_no_pass_ends_later(
    case: tuple[Workload, list[int]], machine: Machine, bits: int, more: int, from_idle: bool
) -> None:
    workload, offsets = replace(case[0], from_idle=from_idle), case[1]
    fewer = ends(workload, machine, offsets, chosen(workload, bits))
    found = ends(workload, machine, offsets, chosen(workload, bits | more))
    assert all(a <= b + 1e-9 for a, b in zip(found, fewer, strict=True))


def test_a_device_computes_as_fast_while_weights_are_on_their_way() -> None:
    workload = replace(chain([4, 4, 4], [10, 10, 10]), busy_seconds=(15.0, 15.0, 15.0))
    machine = Machine(1.0, 0.0, contention=0.5, copy_bandwidth=float(PAGE), copy_latency=0.0)
    timing = simulate(workload, machine, (), [0, 1, 2], [0, PAGE, 0], passes=6)
    assert timing.compute == 30.0
    assert timing.beside_reading > 0


def test_a_cached_block_waits_behind_one_that_is_read_but_reading_goes_on_beside_it() -> None:
    # Reads of 6 ticks, copies of 2 (the last chunk takes 1), layer 1 cached. Layer 0 is read by 6 and in at 7; layer 1
    # behind it at 9; layer 2 is read from 6 to 12, and in at 13, when layer 1 has been computed for 4 ticks.
    blocks = tuple(Block(f"layer{i}", 2 * PAGE, 6, ((i, i),)) for i in range(3))
    workload = Workload(blocks, (1.0, 4.0, 1.0))
    machine = Machine(1.0, 0.0, copy_bandwidth=float(PAGE), copy_latency=0.0, chunk=PAGE)
    timing = simulate(workload, machine, (), [0, 1, 2], [0, 2 * PAGE, 4 * PAGE], passes=1, cached={1})
    assert timing.stall_by_block == {0: 7.0, 1: 1.0}
    assert timing.latency == 14.0
    assert (timing.bytes_read, timing.bytes_copied) == (12, 6 * PAGE)


@pytest.mark.parametrize(("ticks", "rested"), [(1.0, set[int]()), (30.0, {0, 1, 2, 3})])
@pytest.mark.parametrize("copy_bandwidth", [0.0, PAGE / 10])
def test_a_block_is_noted_where_nothing_was_on_its_way_when_its_place_came_free(
    copy_bandwidth: float, ticks: float, rested: set[int]
) -> None:
    # Ten ticks to bring a layer in, from storage or from host memory, and two slots for four of them.
    workload, seen = replace(chain([10] * 4, [0] * 4), step_seconds=(ticks,) * 4), Lead()
    machine = replace(TICKS, copy_bandwidth=copy_bandwidth, copy_latency=0.0)
    offsets = [0, PAGE, 0, PAGE]
    simulate(workload, machine, (), [0, 1, 2, 3], offsets, passes=6, lead=seen, cached=[0, 1, 2, 3])
    assert seen.rested == rested
