"""Every worked example of research/realtime.md, exactly."""

from __future__ import annotations

from fractions import Fraction

import pytest

from narrowboat.tasks.analysis import edf, fp
from narrowboat.tasks.analysis.memory import footprint, need
from narrowboat.tasks.analysis.model import Arrival, Block, Supply, Task
from narrowboat.tasks.analysis.overrun import tolerated
from narrowboat.tasks.analysis.pipeline import makespan, segments, stages_makespan, whole_swap


def task(name: str, cost: int, period: int, deadline: int | None = None, **more: object) -> Task:
    return Task(name, (cost,), Arrival(period), deadline or period, **more)  # type: ignore[arg-type]


def chain(name: str, cost: int, longest: int, last: int, period: int, deadline: int | None = None, p: int = 0) -> Task:
    """Segments with that sum, that largest and that last one."""
    rest = cost - last
    parts: list[int] = []
    while rest > 0:
        parts.append(min(longest, rest))
        rest -= parts[-1]
    if longest not in (*parts, last):
        raise AssertionError("the example cannot be built of these")
    return Task(name, (*parts, last), Arrival(period), deadline or period, p)


BLOCKS = {
    "t1": [Block(2, 3), Block(2, 4), Block(2, 3)],
    "t2": [Block(5, 4), Block(5, 4), Block(5, 4), Block(5, 3)],
    "t3": [Block(8, 7), Block(8, 6), Block(7, 6), Block(7, 6)],
}
PERIODS = {"t1": 60, "t2": 100, "t3": 200}


def swapped() -> list[Task]:
    return [
        Task(name, segments(blocks), Arrival(PERIODS[name]), PERIODS[name], priority)
        for (name, blocks), priority in zip(BLOCKS.items(), (9, 5, 1), strict=True)
    ]


def bounds(tasks: list[Task], supply: Supply | None = None, policy: str = "edf") -> list[int | None]:
    room = edf if policy == "edf" else fp
    return [room.response(tasks, each, supply or Supply()).bound for each in tasks]


def test_pipeline_of_two_and_of_three_buffers() -> None:
    blocks = [Block(load, compute) for load, compute in zip([6, 5, 7, 12], [12, 11, 2, 5], strict=True)]
    assert sum(block.load + block.compute for block in blocks) == 60
    assert makespan(blocks, 2) == 46 == sum(segments(blocks))
    assert makespan(blocks, 3) == 36
    assert stages_makespan([[6, 5, 7, 12], [12, 11, 2, 5]], [2]) == 46


def test_segments_of_the_three_swapped_networks() -> None:
    assert [segments(blocks) for blocks in BLOCKS.values()] == [(2, 3, 4, 3), (5, 5, 5, 5, 3), (8, 8, 7, 7, 6)]
    assert [sum(segments(blocks)) for blocks in BLOCKS.values()] == [12, 23, 36]


def test_memory_of_the_three_swapped_networks() -> None:
    sizes = [[20, 20, 20], [50, 50, 50, 50], [80, 80, 70, 70]]
    parts = [
        footprint(name, [Block(1, 1, size) for size in each], activations, PERIODS[name])
        for name, each, activations in zip(BLOCKS, sizes, (4, 6, 8), strict=True)
    ]
    assert [part.running for part in parts] == [44, 106, 168]
    assert [part.kept for part in parts] == [24, 56, 88]
    assert need(parts, keep=True).nbytes == 194
    assert need(parts, keep=False).nbytes == 168
    whole = [
        footprint(name, [Block(1, 1, size) for size in each], 0, 0, resident=True)
        for name, each in zip(BLOCKS, sizes, strict=True)
    ]
    assert need(whole, keep=True).nbytes == 560


def test_t1_preemptive_edf_by_processor_demand() -> None:
    first = [task("a", 2, 6, 4, preemptive=True), task("b", 2, 8, 6, preemptive=True)]
    assert edf.violation([*first, task("c", 4, 12, preemptive=True)]) is None
    second = [task("a", 2, 6, 4), task("b", 3, 8, 6), task("c", 3, 12, 8)]
    found = edf.violation([Task(t.name, t.segments, t.arrival, t.deadline, preemptive=True) for t in second])
    assert found is not None
    assert (found.instant, found.demand, found.blocking) == (22, 23, 0)


def test_t2_non_preemptive_edf() -> None:
    assert edf.violation([task("a", 2, 5), task("b", 3, 12), task("c", 4, 30)]) is None
    found = edf.violation([task("a", 2, 5), task("b", 3, 12), task("c", 5, 30)])
    assert found is not None
    assert (found.instant, found.demand, found.blocking, found.blocker) == (5, 2, 4, "c")


@pytest.mark.parametrize(("last", "passes"), [(20, True), (26, True), (27, False)])
def test_t3_limited_preemptive_edf(last: int, passes: bool) -> None:
    def cut(cost: int, longest: int) -> tuple[int, ...]:
        return (*[longest] * (cost // longest), *([cost % longest] if cost % longest else []))

    whole = [task("detector", 8, 33), task("tracker", 20, 100), task("segmenter", 60, 200)]
    assert edf.violation(whole) is not None
    tasks = [whole[0], whole[1], Task("segmenter", cut(60, last), Arrival(200), 200)]
    assert (edf.violation(tasks) is None) is passes
    assert [edf.largest_segment(tasks, each) for each in tasks] == [None, 26, 26]


def test_t3_largest_segments_under_fixed_priorities() -> None:
    tasks = [task("a", 2, 8, priority=3), task("b", 3, 15, priority=2), task("c", 6, 40, priority=1)]
    assert [fp.tolerance(tasks, each) for each in tasks] == [6, 8, 15]
    assert [fp.largest_segment(tasks, each) for each in tasks] == [None, 7, 7]


def test_t4_the_vector_on_which_the_1994_analysis_of_can_is_wrong() -> None:
    tasks = [
        Task("a", (100,), Arrival(250), 250, 3),
        Task("b", (100,), Arrival(350), 325, 2),
        Task("c", (100,), Arrival(350), 325, 1),
    ]
    assert fp.response(tasks, tasks[2]).bound == 350


def test_t5_limited_preemption_of_swapped_networks() -> None:
    tasks = swapped()
    assert bounds(tasks) == [19, 42, 83] == bounds(tasks, policy="fp")
    assert bounds([each.whole() for each in tasks]) == [47, 70, 71]
    swaps = [
        Task(each.name, segments(whole_swap(BLOCKS[each.name])), each.arrival, each.deadline, each.priority)
        for each in tasks
    ]
    assert bounds([each.whole() for each in swaps])[0] == 70
    assert bounds(swaps) == [45, 80, 122]
    assert bounds(swaps, policy="fp") == [45, 96, 122]


def test_t5_further_vectors() -> None:
    under_fp = [chain("a", 4, 2, 2, 12, p=3), chain("b", 6, 3, 3, 20, p=2), chain("c", 8, 4, 3, 40, p=1)]
    assert bounds(under_fp, policy="fp") == [7, 13, 22]
    under_edf = [chain("a", 4, 2, 2, 12, 24), chain("b", 6, 3, 3, 20, 35), chain("c", 8, 4, 4, 40, 40)]
    assert bounds(under_edf) == [7, 17, 22]
    whole = [task("a", 79, 120, 50), task("b", 11, 34, 100), task("c", 1, 190, 120)]
    assert bounds(whole) == [89, 90, 121]


def test_t7_a_processor_that_is_not_wholly_ours() -> None:
    tasks = swapped()
    assert bounds(tasks, Supply(Fraction(9, 10), 2)) == [24, 49, 95]
    assert bounds(tasks, Supply.of(0.85, 12)) == [35, 62, 151]
    assert bounds(tasks, Supply.of(0.7, 40))[0] == 69
    cut = [
        task("detector", 8, 33),
        task("tracker", 20, 100),
        Task("segmenter", (20, 20, 20), Arrival(200), 200),
    ]
    assert bounds(cut) == [27, 47, 104]
    assert bounds(cut, Supply(Fraction(9, 10), 10))[0] == 40


@pytest.mark.parametrize(("extra", "expected"), [(5, [24, 47, 88]), (10, [29, 52, 93]), (20, [39, 62, 103])])
def test_t8_overruns(extra: int, expected: list[int]) -> None:
    assert bounds(swapped(), Supply().less(extra)) == expected


def test_t8_the_overrun_that_is_tolerated_is_the_largest() -> None:
    tasks = swapped()

    def meets(supply: Supply) -> bool:
        found = bounds(tasks, supply)
        return all(b is not None and b <= t.deadline for b, t in zip(found, tasks, strict=True))

    most = tolerated(Supply(), 200, meets)
    assert most is not None
    assert meets(Supply().less(most))
    assert not meets(Supply().less(most + 1))
    assert tolerated(Supply(Fraction(1, 2)), 200, meets) is None


def test_t9_a_token_bucket_beside_them() -> None:
    client = Task("client", (4,), Arrival.token_bucket(3, 50), 90, 5)
    assert client.arrival == Arrival(50, 100)
    assert [client.arrival.eta(length) for length in (0, 1, 50, 51)] == [0, 3, 3, 4]
    tasks = [*swapped(), client]
    assert bounds(tasks) == [19, 54, 99, 44]
    assert bounds(tasks, policy="fp") == [19, 58, 99, 54]


def test_twins_delay_each_other() -> None:
    twins = [task("left", 5, 20), task("right", 5, 20)]
    assert bounds(twins) == [10, 10]
    assert bounds(twins, policy="fp") == [10, 10]
