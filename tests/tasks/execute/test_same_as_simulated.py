"""The run-time and the simulator do the same at the same instants, given the same costs: one policy, one record."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import torch

from narrowboat.arena.pool import PagePool
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.job import Job, TaskFacts
from narrowboat.tasks.policy import order
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.record import JobRecord, Record, Segment
from narrowboat.tasks.simulate import Simulation


class Seen:
    """Costs as a run had them; the part that ended last at a boundary has the time of the decision too."""

    def __init__(self, record: Record) -> None:
        self._took = {(p.engine, p.task, p.job, p.block): p.end - p.begin for p in record.segments}
        steps: dict[int, list[Segment]] = {}
        for part in record.segments:
            steps.setdefault(part.begin, []).append(part)
        begins = sorted(steps)
        for begin, following in itertools.pairwise(begins):
            last = max(steps[begin], key=lambda part: part.end)
            waiting = any(
                job.release <= last.end and (job.finish is None or job.finish > last.end) for job in record.jobs
            )
            if waiting:
                self._took[last.engine, last.task, last.job, last.block] = following - begin

    def load(self, job: Job | None, task: TaskFacts, block: int) -> int:
        assert job is not None
        return self._took["load", task.name, job.number, block]

    def compute(self, job: Job, block: int) -> int:
        return self._took["compute", job.task.name, job.number, block]

    def move(self, nbytes: int) -> int:
        raise AssertionError("nothing moves by volume here")


class Noticed(Simulation):
    """Jobs come when the run noticed them, which is a little after their time; what is due when stays as it was."""

    def __init__(self, record: Record, noticed: dict[tuple[str, int], int]) -> None:
        super().__init__(BlockBoundaries(order.edf), Seen(record))
        self._true = {(job.task, job.number): job.release for job in record.jobs}
        begins = sorted(part.begin for part in record.segments)
        self.came: dict[tuple[str, int], int] = {}
        for job in record.jobs:
            seen = noticed[job.task, job.number]
            busy = any((other.start or 0) <= seen < (other.finish or 0) for other in record.jobs)
            # Where nothing was under way the decision took until the first segment began.
            self.came[job.task, job.number] = seen if busy else next(begin for begin in begins if begin >= seen)

    def _release(self, when: int, task: TaskFacts) -> None:
        super()._release(when, task)
        job = self._view.pending[-1]
        job.release = self._true[task.name, job.number]


def test_a_run_is_what_the_simulator_makes_of_its_costs(nets: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = [TaskModel(f"tasks_test_nets:{name}", nets / f"{name}.safetensors") for name in ("wide", "deep", "other")]
    pool = PagePool(4 * max(unit.nbytes for model in models for unit in model.units))
    facts: dict[str, TaskFacts] = {}
    tasks = []
    for index, (model, period) in enumerate(zip(models, (120_000, 50_000, 18_000), strict=True)):
        model.arrange(pool, range(1, len(model.units) + 1), ())
        sizes = tuple(place.nbytes if place else 0 for place in model.places)
        name = f"t{index}"
        facts[name] = TaskFacts(name, index, (1,) * len(sizes), (1,) * len(sizes), sizes, period, period)
        tasks.append(Running(facts[name], model, Source(lambda model=model: model.inputs)))  # type: ignore[misc]
    policy = BlockBoundaries(order.edf)
    # A period is all the time there is: jobs preempt each other, and some are late.
    executor = Executor(tasks, policy, SwapSpace(pool, remember=False), budget=1 << 40)
    seen: dict[tuple[str, int], int] = {}
    released = executor.account.released

    def note(told: JobRecord, now: int) -> None:
        seen[told.task, told.number] = now
        released(told, now)

    executor.account.released = note  # type: ignore[method-assign]
    record = executor.run(1.5)
    for model in models:
        model.close()
    torch.set_num_threads(threads)
    ended = [job for job in record.jobs if job.outcome in ("done", "late")]
    dropped = len(record.jobs) - len(ended)
    assert len(ended) > 10 and sum(job.preemptions for job in ended) > 0
    numbers: dict[str, list[int]] = {name: [] for name in facts}
    for job in ended:
        numbers[job.task].append(job.number)
    # Jobs that were skipped never came, for the simulator: those that did are numbered anew.
    anew = {(name, number): k for name, seen in numbers.items() for k, number in enumerate(sorted(seen))}
    came = Record(
        jobs=[replace(job, number=anew[job.task, job.number]) for job in ended],
        segments=[
            Segment(p.engine, p.what, p.task, anew[p.task, p.job], p.block, p.begin, p.end) for p in record.segments
        ],
    )
    simulation = Noticed(came, {(job.task, anew[job.task, job.number]): seen[job.task, job.number] for job in ended})
    coming = sorted((when, facts[name].index, facts[name]) for (name, _), when in simulation.came.items())
    simulated = simulation.run((when, task) for when, _, task in coming)
    assert _told(simulated) == _told(came), f"{dropped} jobs were dropped"


def _told(record: Record) -> list[tuple[int, str, str, str, int, int]]:
    return sorted((p.begin, p.engine, p.what, p.task, p.job, p.block) for p in record.segments)
