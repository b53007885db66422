"""The pure parts of ``benchmarks/tasks.py``: its sets are what they say, and its rivals are judged fairly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks_kit.admitted import METHODS, _least_volumes, admitted_share
from tasks_kit.report import write_markdown
from tasks_kit.sets import BUDGET, Shape, random_set
from tasks_kit.soundness import admission_times, soundness


@pytest.mark.parametrize("shape", [Shape(), Shape(utilisation=0.8, demand=1.0, load=1.5), Shape(tasks=3, units=4)])
def test_random_sets_have_the_shape_that_was_asked_for(shape: Shape) -> None:
    tasks, told = random_set(shape, 7)
    assert len(tasks) == shape.tasks and all(len(task.units) == shape.units for task in tasks)
    utilisation = sum(sum(u.compute for u in task.units) / task.spec.step for task in tasks)
    assert utilisation == pytest.approx(shape.utilisation, rel=0.02)
    assert sum(u.nbytes for task in tasks for u in task.units) == pytest.approx(shape.demand * BUDGET, rel=0.01)
    assert told.budget == BUDGET
    assert random_set(shape, 7)[0] == tasks != random_set(shape, 8)[0]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 60))
def test_swap_volumes_are_the_least_equal_cap_that_makes_room(weights: list[int], need: int) -> None:
    found = _least_volumes(weights, need)
    caps = [[min(cap, w) for w in weights] for cap in range(max(weights) + 1)]
    right = next((volumes for volumes in caps if sum(volumes) - max(volumes) >= need), [])
    assert found == right


def test_nobody_admits_what_cannot_run_and_all_admit_what_is_idle() -> None:
    for method in METHODS:
        assert admitted_share(Shape(utilisation=2.0, demand=0.5), method, 3, 1) == 0
        assert admitted_share(Shape(utilisation=0.02, demand=0.5, load=0.1), method, 3, 1) == 1


def test_what_is_admitted_elsewhere_is_admitted_by_us() -> None:
    shape = Shape(utilisation=0.4, demand=1.5)
    for seed in range(8):
        tasks, told = random_set(shape, seed)
        if any(METHODS[name](tasks, told) for name in ("pipelined, not preempted", "whole models")):
            assert METHODS["narrowboat"](tasks, told), seed


def test_a_small_run_is_sound_and_is_written(tmp_path: object) -> None:
    from pathlib import Path

    found = soundness(400, 3)
    assert found["jobs"] >= 400
    assert (found["over_bound"], found["missed"], found["sets_beyond_memory"]) == (0, 0, 0)
    told = {
        "seed": 1,
        "sets": 2,
        "seconds": 3,
        "shape": vars(Shape()),
        "curves": {"demand over capacity": {"x": [1.96], "share": {name: [0.5] for name in METHODS}}},
        "soundness": found,
        "admission": admission_times(1, 3, 2),
    }
    page = Path(str(tmp_path)) / "tasks.md"
    write_markdown(told, page)
    assert "| not met | at least twice RT-Swap's share" in page.read_text()
