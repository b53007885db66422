"""Tasks that are run for real: the same bits, the policy's order, and nobody harmed by another's failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from narrowboat.arena.pool import PagePool
from narrowboat.errors import ModelError
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import InputsEndedError, Source
from narrowboat.tasks.execute.model import TaskModel, form_units
from narrowboat.tasks.execute.running import OnEnd, Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy import order
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.record import Record

LONG = 60_000_000


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def opened(nets: Path, *names: str) -> Iterator[list[TaskModel]]:
    models = [TaskModel(f"tasks_test_nets:{name}", nets / f"{name}.safetensors") for name in names]
    yield models
    for model in models:
        model.close()


def running(
    model: TaskModel,
    pool: PagePool,
    name: str,
    index: int,
    period: int = LONG,
    pins: tuple[int, ...] = (),
    **more: Any,
) -> Running:
    ends = list(range(1, len(model.units) + 1))
    if not model.places:
        model.arrange(pool, ends, pins)
    sizes = tuple(place.nbytes if place else 0 for place in model.places)
    facts = TaskFacts(
        name, index, tuple(10_000 * bool(n) for n in sizes), (10_000,) * len(sizes), sizes, period, period
    )
    return Running(facts, model, more.pop("source", Source(lambda: model.inputs)), **more)


def run(tasks: list[Running], pool: PagePool, *, preempt: bool = True, prefetch: bool = False, **more: Any) -> Record:
    executor = Executor(
        tasks,
        BlockBoundaries(order.edf, preempt=preempt, prefetch=prefetch),
        SwapSpace(pool),
        budget=1 << 40,
        **more,
    )
    return executor.run(20, jobs=3) if all(task.closed_loop for task in tasks) else executor.run(1.0)


def into(outputs: list[Any]) -> OnEnd:
    """Of the jobs that came to their end."""
    return lambda told, output: outputs.append(output) if output is not None else None


def plain(nets: Path, name: str, x: torch.Tensor) -> torch.Tensor:
    import tasks_test_nets  # type: ignore[import-not-found]

    module = getattr(tasks_test_nets, name)()
    module.load_state_dict(load_file(str(nets / f"{name}.safetensors")), strict=False)
    with torch.inference_mode():
        return module(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("pins", [(), (0,), (1, 4)])
@pytest.mark.parametrize("prefetch", [False, True])
def test_outputs_have_plain_pytorchs_bits_in_a_pool_of_two_blocks(
    nets: Path, pins: tuple[int, ...], prefetch: bool
) -> None:
    outputs: list[torch.Tensor] = []
    with opened(nets, "deep") as (model,):
        assert len(model.units) == 6
        pool = PagePool(2 * max(unit.nbytes for unit in model.units))
        task = running(model, pool, "deep", 0, pins=pins, closed_loop=True, on_end=into(outputs))
        record = run([task], pool, prefetch=prefetch)
    assert [job.outcome for job in record.jobs] == ["done"] * 3
    wanted = plain(nets, "deep", torch.ones(1, 256))
    assert len(outputs) == 3 and all(torch.equal(output, wanted) for output in outputs)
    assert sum(s.what == "compute" for s in record.segments) == 18


def test_layers_too_large_for_a_window_are_computed_in_tiles_to_the_same_bits(
    nets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("narrowboat.tasks.execute.model._TILE", 1 << 20)
    outputs: list[torch.Tensor] = []
    with opened(nets, "wide") as (model,):
        assert len(model.units) == 9 and max(unit.nbytes for unit in model.units) < 1100 << 10  # of 4 MiB
        pool = PagePool(2 * max(unit.nbytes for unit in model.units))
        record = run([running(model, pool, "wide", 0, closed_loop=True, on_end=into(outputs))], pool)
    assert [job.outcome for job in record.jobs] == ["done"] * 3
    wanted = plain(nets, "wide", torch.ones(1, 1024))
    assert all(torch.equal(output, wanted) for output in outputs)


def test_tasks_in_turn_have_their_own_bits(nets: Path) -> None:
    outputs: dict[str, list[torch.Tensor]] = {"deep": [], "other": []}
    with opened(nets, "deep", "other") as models:
        pool = PagePool(4 * max(unit.nbytes for model in models for unit in model.units))
        tasks = [
            running(model, pool, name, k, period=[90_000, 40_000][k], on_end=into(outputs[name]))
            for k, (model, name) in enumerate(zip(models, outputs, strict=True))
        ]
        record = run(tasks, pool)
    wanted = {"deep": plain(nets, "deep", torch.ones(1, 256)), "other": plain(nets, "other", torch.ones(1, 128))}
    for name, found in outputs.items():
        assert len(found) >= 3 and all(torch.equal(output, wanted[name]) for output in found)
    assert {job.task for job in record.jobs if job.outcome == "done"} == {"deep", "other"}


def test_two_tasks_share_one_network_and_preempt_each_other_in_it(nets: Path) -> None:
    outputs: list[torch.Tensor] = []
    with opened(nets, "deep") as (model,):
        pool = PagePool(4 * max(unit.nbytes for unit in model.units))
        slow = running(model, pool, "slow", 0, period=100_000, on_end=into(outputs))
        quick = running(model, pool, "quick", 1, period=7_000, on_end=into(outputs))
        record = run([slow, quick], pool)
    wanted = plain(nets, "deep", torch.ones(1, 256))
    assert len(outputs) > 20 and all(torch.equal(output, wanted) for output in outputs)
    assert sum(job.outcome in ("done", "late") for job in record.jobs if job.task == "slow") >= 5


def test_releases_do_not_drift(nets: Path) -> None:
    with opened(nets, "deep") as (model,):
        pool = PagePool(2 * max(unit.nbytes for unit in model.units))
        record = run([running(model, pool, "deep", 0, period=50_000, offset=3_000)], pool)
    assert [job.release for job in record.jobs] == [3_000 + 50_000 * k for k in range(20)]
    assert all(job.start is None or job.start >= job.release for job in record.jobs)


def test_a_model_that_raises_in_the_middle_fails_its_job_only(nets: Path) -> None:
    import tasks_test_nets  # type: ignore[import-not-found]

    values = tasks_test_nets.bad_inputs()
    with opened(nets, "moody", "other") as (moody, other):
        pool = PagePool(4 * max(unit.nbytes for unit in (*moody.units, *other.units)))
        tasks = [
            running(moody, pool, "moody", 0, period=100_000, source=Source(lambda: (next(values),))),
            running(other, pool, "other", 1, period=50_000),
        ]
        record = run(tasks, pool)
        assert tasks[0].model.blocks[3].shown is False
    ends = {name: [j.outcome for j in record.jobs if j.task == name] for name in ("moody", "other")}
    assert ends["moody"] == ["done", "failed"] * 5
    assert set(ends["other"]) == {"done"}
    failed = next(job for job in record.jobs if job.outcome == "failed")
    assert "failed in the middle" in failed.cause


def test_inputs_that_stop_end_their_task_only(nets: Path) -> None:
    import tasks_test_nets  # type: ignore[import-not-found]

    values = tasks_test_nets.three_inputs()

    def take() -> tuple[torch.Tensor, ...]:
        try:
            return (next(values),)
        except StopIteration as error:
            raise InputsEndedError from error

    sources: dict[str, Callable[[], Any]] = {"deep": take, "other": lambda: None}
    with opened(nets, "deep", "other") as models:
        pool = PagePool(4 * max(unit.nbytes for model in models for unit in model.units))
        tasks = [
            running(model, pool, name, k, period=50_000, source=Source(source))
            for k, (model, (name, source)) in enumerate(zip(models, sources.items(), strict=True))
        ]
        record = run(tasks, pool)
    assert [job.outcome for job in record.jobs if job.task == "deep"] == ["done"] * 3
    skipped = [job for job in record.jobs if job.task == "other"]
    assert len(skipped) == 20 and {job.cause for job in skipped} == {"no input has come"}


def test_a_job_over_its_budget_is_ended_at_a_boundary_where_that_was_asked_for(nets: Path) -> None:
    with opened(nets, "deep", "other") as models:
        pool = PagePool(4 * max(unit.nbytes for model in models for unit in model.units))
        strict, other = (
            running(m, pool, n, k, period=50_000) for k, (m, n) in enumerate(zip(models, "ab", strict=True))
        )
        tight = TaskFacts(**{**vars(strict.facts), "computes": (1,) * 6, "loads": (1,) * 6})
        record = run([Running(tight, models[0], strict.source, overrun="abort"), other], pool)
    assert {job.outcome for job in record.jobs if job.task == "a"} == {"aborted"}
    assert {job.outcome for job in record.jobs if job.task == "b"} == {"done"}
    assert record.premises["overruns"] > 0


def test_what_waits_behind_an_unfinished_job_is_skipped_with_its_cause(nets: Path) -> None:
    with opened(nets, "deep") as (model,):
        pool = PagePool(2 * max(unit.nbytes for unit in model.units))
        record = run([running(model, pool, "deep", 0, period=300)], pool)
    causes = {job.cause for job in record.jobs if job.outcome == "skipped"}
    assert causes <= {"the job before is still under way", "its deadline had passed before it began"} and causes


def test_a_pool_of_one_block_goes_on_one_after_the_other(nets: Path) -> None:
    outputs: list[torch.Tensor] = []
    with opened(nets, "deep") as (model,):
        pool = PagePool(max(unit.nbytes for unit in model.units))
        record = run([running(model, pool, "deep", 0, closed_loop=True, on_end=into(outputs))], pool)
    assert [job.outcome for job in record.jobs] == ["done"] * 3
    assert all(torch.equal(output, plain(nets, "deep", torch.ones(1, 256))) for output in outputs)


def test_a_pool_that_holds_no_block_fails_the_job_and_says_so(nets: Path) -> None:
    with opened(nets, "deep") as (model,):
        pool = PagePool(4096)
        record = run([running(model, pool, "deep", 0, closed_loop=True)], pool)
    assert {job.outcome for job in record.jobs} == {"failed"}
    assert "does not fit beside" in record.jobs[0].cause


def test_a_network_without_a_traced_order_is_refused(nets: Path) -> None:
    import tasks_test_nets  # type: ignore[import-not-found]
    from torch import nn

    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 256)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) if float(x.sum()) > 0 else self.b(x)

    factory: Any = Fickle
    factory.example_inputs = lambda: (torch.ones(1, 256),)
    tasks_test_nets.fickle = factory
    import narrowboat as nb

    nb.pack(Fickle().state_dict(), nets / "fickle.safetensors")
    with pytest.raises(ModelError, match="cannot be a task"):
        TaskModel("tasks_test_nets:fickle", nets / "fickle.safetensors")


def test_weights_whose_uses_overlap_are_one_unit_and_those_used_again_stay(nets: Path) -> None:
    from narrowboat.plan.model import Block
    from narrowboat.profile.workload import Group

    def group(name: str, *holds: tuple[int, int]) -> Group:
        return Group((0,), (0,), Block(name, 4096, 4096, holds))

    units, staying = form_units(
        [group("a", (0, 2)), group("b", (2, 5)), group("c", (7, 8)), group("d", (1, 1), (9, 9))]
    )
    assert [(unit.groups, unit.first_step) for unit in units] == [((0, 1), 0), ((2,), 7)]
    assert staying == [3]
