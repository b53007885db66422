"""The timing recurrence against worked examples and against a simulation clock tick by clock tick."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.plan import Block, Machine, Workload, simulate
from narrowboat.plan.layout import place

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
