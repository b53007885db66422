"""Tasks on an emulated device from a description to a record that conforms; and what is told where that cannot be."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat import TaskSet
from narrowboat.errors import AdmissionError, DeviceMemoryError, NarrowboatError, NoDeviceError
from narrowboat.tasks.conform import conform
from narrowboat.tasks.live import LiveRun
from narrowboat.tasks.record import Record
from task_sets_kit import ANYWHERE, assert_premises

HEAD = "device: {device}\nbudget: {budget}\nmargin: 4\ncalibration: 200ms\n"
TASKS = """\
tasks:
  - {name: deep, model: "tasks_test_nets:deep", weights: deep.safetensors, period: 1400ms}
  - {name: other, model: "tasks_test_nets:other", weights: other.safetensors, period: 700ms}
  - {name: moody, model: "tasks_test_nets:moody", weights: moody.safetensors, period: 1800ms}
  - {name: twin, model: "tasks_test_nets:other", weights: other.safetensors, period: 1000ms, guarantee: best-effort}
"""
DEVICE = "emulated:2MiB:400MB:16KiB"  # 3.7 MB of weights


def load(nets: Path, *, device: str = DEVICE, budget: str = "1920KiB", more: str = "", tasks: str = TASKS) -> TaskSet:
    (nets / "device.yaml").write_text(HEAD.format(device=device, budget=budget) + more + tasks)
    return TaskSet.load(nets / "device.yaml")


def test_tasks_of_twice_the_devices_limit_are_admitted_run_and_conform(nets: Path) -> None:
    task_set = load(nets)
    said: list[str] = []
    task_set.tell = said.append
    verdict = task_set.admit()
    assert verdict.admitted and verdict.needed_bytes <= verdict.budget, verdict.reasons
    networks = {task.network: sum(unit.nbytes for unit in task.units) for task in task_set.costed}
    assert sum(networks.values()) > 1.9 * task_set.settings.budget
    assert all(size % (16 << 10) == 0 for task in task_set.facts() for size in task.nbytes)
    task_set.run(3).save(nets / "device.json")
    record = Record.load(nets / "device.json")
    assert [job.cause for job in record.jobs if job.outcome == "failed"] == []
    assert_premises(record, "a record of the jobs", *ANYWHERE)
    assert record.premises["device"] == "emulated" and record.premises["device_copied_bytes"] > 0
    assert 0 < record.premises["peak_bytes"] <= task_set.settings.budget
    assert record.memory and all(held <= task_set.settings.budget for _, held in record.memory)
    told = conform(record)
    assert told.missed == 0 or not told.valid
    assert sum(job.outcome == "done" for job in record.jobs) >= 6
    assert any("host memory" in each for each in said)


def test_costs_of_a_device_are_its_own(nets: Path) -> None:
    first = load(nets)
    networks = {task.name: task.network for task in first.costed}
    again = load(nets)
    assert {task.name: task.network for task in again.costed} == networks
    one = "".join(TASKS.splitlines(keepends=True)[:2])  # each network is measured in a process of its own
    for other in (
        load(nets, device="emulated:2MiB:300MB:16KiB", tasks=one),
        load(nets, device="cpu", budget="60MiB", tasks=one),
    ):
        assert [task.name for task in other.costed] == ["deep"]
        assert not set(networks.values()) & {task.network for task in other.costed}
    assert "one thread" not in first.profiles["deep"]["condition"]
    # Loads of 260 KiB at 400 MB/s: 0.67 ms at least.
    assert min(unit.load for unit in first.costed[0].units) >= 600


def test_a_host_budget_too_small_for_all_weights_is_kept_and_the_rest_is_read(nets: Path) -> None:
    task_set = load(nets, more="host_budget: 2MiB\n")
    verdict = task_set.admit()
    mirrors = task_set.measured["mirrors"]
    assert verdict.admitted and task_set.measured["host_budget"] == 2 << 20
    assert 0 < sum(len(units) for units in mirrors.values()) < sum(len(task.units) for task in task_set.costed)
    record = task_set.run(1.5)
    assert [job.cause for job in record.jobs if job.outcome == "failed"] == []
    assert_premises(record, *ANYWHERE)
    assert 0 < record.premises["pinned_bytes"] <= 2 << 20


def test_a_task_joins_and_the_budget_changes_while_others_run(nets: Path) -> None:
    known = load(nets)
    known.admit()

    def described(*names: str, budget: str = "1920KiB") -> TaskSet:
        lines = TASKS.splitlines(keepends=True)
        chosen = lines[0] + "".join(line for line in lines[1:] if any(f"name: {name}," in line for name in names))
        return known.with_settings(load(nets, budget=budget, tasks=chosen).settings)

    with described("deep").start() as run:
        time.sleep(0.4)
        run.change(described("deep", "other"))
        run.set_budget("1600KiB")
        time.sleep(0.5)
        with pytest.raises(AdmissionError, match="device cannot be changed"):
            run.change(load(nets, device="emulated:4MiB", budget="1920KiB"))
        record = stopped(run)
    assert [job.cause for job in record.jobs if job.outcome == "failed"] == []
    assert len(record.changes) == 3
    assert {job.task for job in record.jobs if job.outcome == "done"} == {"deep", "other"}
    assert_premises(record, *ANYWHERE)


def stopped(run: LiveRun) -> Record:
    run.stop()
    return run.wait(30)


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_check_and_run_say_so(nets: Path) -> None:
    task_set = load(nets, device="cuda", budget="60MiB")
    with pytest.raises(NoDeviceError, match="device 'cuda' cannot be used"):
        task_set.admit()
    with pytest.raises(NoDeviceError, match="device 'cuda' cannot be used"):
        task_set.run(1)


def test_a_budget_above_what_the_device_has_free_is_refused(nets: Path) -> None:
    with pytest.raises(DeviceMemoryError, match=r"above the 2\.00 MiB that emulated has free"):
        load(nets, budget="3MiB").admit()


def test_a_host_budget_that_holds_no_buffers_is_refused(nets: Path) -> None:
    with pytest.raises(NarrowboatError, match=r"host_budget 64\.0 KiB holds neither all weights"):
        load(nets, more="host_budget: 64KiB\n").admit()


def test_the_memory_that_is_needed_is_named_where_it_does_not_suffice(nets: Path) -> None:
    verdict = load(nets, budget="700KiB").admit()
    assert not verdict.admitted and verdict.reasons[0].startswith("memory:")
    wanted = next(said for said in verdict.suggestions if said.startswith("budget:"))
    enough = load(nets, budget=wanted.split("(")[1].split()[0], device="emulated:2MiB:400MB:16KiB")
    assert not any(reason.startswith("memory:") for reason in enough.admit().reasons)


def test_a_device_is_only_looked_for_where_something_runs(nets: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    described = TaskSet.from_dict(
        {
            "device": "cuda:1",
            "budget": "1GiB",
            "tasks": [{"name": "t", "period": "10ms", "blocks": [{"load": "1ms", "compute": "1ms", "bytes": "1MB"}]}],
        }
    )
    assert described.admit().admitted
    assert described.simulate(1).jobs
