"""RT-Swap's policy on an emulated device: whole jobs, swapped by volume, within the limit; and its trace conforms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat.arena.device.access import AccessWatch
from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.tasks.conform import conform
from narrowboat.tasks.execute.device_model import DeviceTaskModel
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy.volume import VolumeSwap
from narrowboat.tasks.record import Record
from task_device_kit import GRAIN, facts_of, on_device, plain, watched
from task_sets_kit import ANYWHERE, assert_premises

__all__ = ["watched"]
NAMES = ("deep", "other", "moody")
COST = 400_000


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setup(facts: list[TaskFacts], budget: int) -> dict[str, Any]:
    """What a run under RT-Swap's rules assumes; nothing is promised."""
    return {
        "policy": "rt-swap",
        "preemption": "np",
        "prefetch": False,
        "budget_bytes": budget,
        "supply": {"share": 1.0, "delay_us": 50_000},
        "overhead_us": 5_000,
        "chunk_us": 1_000,
        "admitted": False,
        "tasks": [
            {
                "name": task.name,
                "index": task.index,
                "priority": 0,
                "guaranteed": True,
                "deadline_us": task.deadline,
                "period_us": task.period,
                "jitter_us": 0,
                "loads_us": list(task.loads),
                "computes_us": list(task.computes),
                "nbytes": list(task.nbytes),
                "activation_bytes": 0,
                "bound_us": None,
            }
            for task in facts
        ],
    }


def rtswap(models: list[DeviceTaskModel], limit: int, outputs: dict[str, list[Any]], seconds: float = 1.5) -> Record:
    """Whole networks as one block each, all of it swappable, in ``limit`` bytes."""
    facts: list[TaskFacts] = []
    tasks = []
    for index, (model, name) in enumerate(zip(models, NAMES, strict=True)):
        model.arrange(None, [len(model.units)], ())
        told = facts_of(model, name, index, 150_000 + 60_000 * index, COST)
        facts.append(replace(told, swap_bytes=told.nbytes[0]))
        keep = outputs.setdefault(name, [])
        tasks.append(
            Running(
                facts[-1],
                model,
                Source(lambda model=model: model.inputs),  # type: ignore[misc]
                on_end=lambda told, out, keep=keep: keep.append(out),  # type: ignore[misc]
            )
        )
    ground = models[0].ground
    space = SwapSpace(ground.pool(limit))
    policy = VolumeSwap(facts, space.pool.nbytes, ground.chunk)
    executor = Executor(tasks, policy, space, budget=limit, ground=ground)
    record = executor.run(seconds)
    record.setup = setup(facts, limit)
    assert space.pool.free_bytes == policy.free  # the two count alike
    return record


@pytest.mark.parametrize("share", [0.52, 0.9], ids=["1.92 times the limit", "1.11 times"])
def test_rt_swaps_rules_run_on_a_device_and_conform(
    nets: Path, tmp_path: Path, watched: list[AccessWatch], share: float
) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN, bandwidth=400e6, jitter=5)
    outputs: dict[str, list[Any]] = {}
    with on_device(nets, device, *NAMES) as models:
        demand = sum(unit.nbytes for model in models for unit in model.units)
        limit = int(demand * share) // GRAIN * GRAIN
        record = rtswap(models, limit, outputs)
        assert device.memory()[0] >= 0
    record.save(tmp_path / "rt-swap.json")
    record = Record.load(tmp_path / "rt-swap.json")
    assert [job.cause for job in record.jobs if job.outcome == "failed"] == []
    kinds = {part.what for part in record.segments}
    assert kinds == {"swap_in", "swap_out", "run"}
    assert record.premises["peak_bytes"] <= limit and all(held <= limit for _, held in record.memory)
    # Only what is needed goes out: parts of networks.
    whole = {task["name"]: task["nbytes"][0] for task in record.setup["tasks"]}
    assert any(part.nbytes < whole[part.task] for part in record.segments if part.what == "swap_out")
    assert_premises(record, "a record of the jobs", *ANYWHERE)
    assert conform(record).wording.startswith("none was given: the set was not admitted")
    for name in NAMES:
        wanted = plain(nets, name, torch.ones(1, 128 if name == "other" else 256))
        found = [output for output in outputs[name] if output is not None]
        assert found and all(torch.equal(output, wanted) for output in found)


def test_weights_that_are_not_in_host_memory_are_swapped_by_volume_too(nets: Path, watched: list[AccessWatch]) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN)
    outputs: dict[str, list[Any]] = {}
    with on_device(nets, device, *NAMES, host_budget=2 << 20) as models:
        demand = sum(unit.nbytes for model in models for unit in model.units)
        record = rtswap(models, demand * 6 // 10 // GRAIN * GRAIN, outputs)
    assert [job.cause for job in record.jobs if job.outcome == "failed"] == []
    wanted = plain(nets, "deep", torch.ones(1, 256))
    assert outputs["deep"] and all(torch.equal(output, wanted) for output in outputs["deep"] if output is not None)


def test_a_swap_in_without_memory_fails_its_job_and_later_ones_go_on(nets: Path) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN)
    outputs: dict[str, list[Any]] = {}
    with on_device(nets, device, *NAMES) as models:
        demand = sum(unit.nbytes for model in models for unit in model.units)
        limit = demand * 6 // 10 // GRAIN * GRAIN
        count = 0
        plainly = EmulatedDevice.map

        def map_now_and_then(address: int, nbytes: int) -> object:
            nonlocal count
            count += 1
            if 200 < count < 204:  # three jobs' swap-ins
                device.take(16 << 20)
            try:
                return plainly(device, address, nbytes)
            finally:
                if 200 < count < 204:
                    device.take(-(16 << 20))

        device.map = map_now_and_then  # type: ignore[method-assign]
        record = rtswap(models, limit, outputs, 2.5)
        del device.map
    failed = [job for job in record.jobs if job.outcome == "failed"]
    assert failed and all("DeviceMemoryError" in job.cause for job in failed)
    last = max(job.release for job in failed)
    assert any(job.outcome == "done" and job.release > last for job in record.jobs)


def test_a_forced_order_that_is_none_is_seen(nets: Path) -> None:
    device = EmulatedDevice(16 << 20, granularity=GRAIN)
    with on_device(nets, device, *NAMES) as models:
        demand = sum(unit.nbytes for model in models for unit in model.units)
        record = rtswap(models, demand * 6 // 10 // GRAIN * GRAIN, {})
    record.segments = [part for part in record.segments if part.what != "swap_in"]
    runs = [part for part in record.segments if part.what == "run"]
    late = next(job for job in record.jobs if (job.task, job.number) == (runs[-1].task, runs[-1].job))
    waiting = replace(late, task="deep" if late.task != "deep" else "other", number=900, release=0, due=1, start=None)
    record.jobs.append(replace(waiting, outcome="done", finish=record.end))
    premises = {premise.name: premise for premise in conform(record).premises}
    assert not premises["the right job at every boundary"].holds
