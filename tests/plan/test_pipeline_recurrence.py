"""The recurrence of stages and links against a clock, and against the recurrence of one streamed pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.plan import Block, Machine, Workload, simulate
from narrowboat.plan.layout import place
from narrowboat.plan.pipeline import Hop, StageTime, flow

TICKS = Machine(bandwidth=1.0, read_latency=0.0)
times = st.integers(0, 9).map(float)
stage_times = st.tuples(times, times).map(lambda pair: StageTime(min(pair), max(pair)))
hops = st.tuples(times, times).map(lambda pair: Hop(*pair))


@st.composite
def lines(draw: st.DrawFn) -> tuple[list[StageTime], list[Hop]]:
    stages = draw(st.lists(stage_times, min_size=1, max_size=4))
    return stages, draw(st.lists(hops, min_size=len(stages) + 1, max_size=len(stages) + 1))


def on_a_clock(stages: list[StageTime], links: list[Hop], inputs: int, in_flight: int) -> list[float]:
    """When each output comes, by events: what is free takes the next input that is there."""
    # Where an input is: 2 h is the queue of link h, 2 s + 1 that of stage s.
    queues: list[list[tuple[float, int]]] = [[] for _ in range(2 * len(stages) + 1)]
    free = [float("-inf")] * len(queues)
    done: list[float] = []
    entered = 0
    while len(done) < inputs:
        while entered < inputs and (entered < in_flight or len(done) > entered - in_flight):
            queues[0].append((0.0 if entered < in_flight else done[entered - in_flight], entered))
            entered += 1
        moves = []
        for at, queue in enumerate(queues):
            if not queue:
                continue
            there, number = queue[0]
            if at % 2 == 0:
                ends = max(free[at], there) + links[at // 2].seconds
                moves.append((ends, at, number, ends + links[at // 2].latency))
            else:
                stage = stages[at // 2]
                ends = max(free[at] + stage.steady, there + stage.first)
                moves.append((ends, at, number, ends))
        ends, at, number, arrives = min(moves)
        queues[at].pop(0)
        free[at] = ends
        if at + 1 < len(queues):
            queues[at + 1].append((arrives, number))
        else:
            done.append(arrives)
    return done


@given(lines(), st.integers(1, 8), st.integers(1, 5))
def test_outputs_come_when_a_clock_says(line: tuple[list[StageTime], list[Hop]], inputs: int, in_flight: int) -> None:
    stages, links = line
    assert flow(stages, links, inputs, in_flight).done == pytest.approx(on_a_clock(stages, links, inputs, in_flight))


@given(lines(), st.integers(1, 5))
def test_the_period_is_that_of_many_inputs(line: tuple[list[StageTime], list[Hop]], in_flight: int) -> None:
    stages, links = line
    many = flow(stages, links, 240, in_flight)
    # In the long run: over a multiple of every number that may be in flight, so that the pattern has repeated.
    assert (many.done[239] - many.done[119]) / 120 == pytest.approx(many.period, abs=1e-9)
    assert flow(stages, links, 1, in_flight).makespan == pytest.approx(many.latency)


def test_two_equal_stages_give_twice_the_throughput_and_the_same_latency() -> None:
    free = Hop(0.0, 0.0)
    one = flow([StageTime(2.0, 2.0)], [free] * 2, in_flight=4)
    two = flow([StageTime(1.0, 1.0)] * 2, [free] * 3, in_flight=4)
    assert (one.latency, two.latency) == (2.0, 2.0)
    assert two.throughput == 2 * one.throughput


def test_a_slow_link_is_one_more_stage() -> None:
    stages = [StageTime(1.0, 1.0)] * 2
    links = [Hop(0.0, 0.0), Hop(0.5, 3.0), Hop(0.0, 0.0)]
    found = flow(stages, links, in_flight=8)
    assert (found.period, found.latency) == (3.0, 5.5)


@st.composite
def streamed(draw: st.DrawFn) -> tuple[Workload, list[int]]:
    layers = draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=3, max_size=8))
    blocks = tuple(Block(f"layer{i}", 4096, load, ((i, i),)) for i, (load, _) in enumerate(layers))
    places = place(blocks, 4096 * draw(st.integers(1, len(layers) - 1)))
    assert places is not None
    return Workload(blocks, tuple(float(compute) for _, compute in layers)), places


@settings(max_examples=60)
@given(streamed(), st.integers(0, 400))
def test_a_stage_that_rests_is_never_faster_than_said(case: tuple[Workload, list[int]], gap: int) -> None:
    workload, places = case
    order = range(len(workload.blocks))
    first, steady = (
        simulate(replace(workload, from_idle=idle), TICKS, (), order, places, 12).latency for idle in (True, False)
    )
    # A rest is a step without weights, during which reading goes on.
    shifted = tuple(replace(b, holds=((i + 1, i + 1),)) for i, b in enumerate(workload.blocks))
    resting = Workload(shifted, (float(gap), *workload.step_seconds))
    took = simulate(resting, TICKS, (), order, places, 60).latency
    said = max(steady, gap + min(first, steady))
    assert took >= said - 1e-6
    if gap == 0 or gap >= sum(block.read_bytes for block in workload.blocks):
        assert took == pytest.approx(said)
