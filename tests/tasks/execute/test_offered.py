"""Jobs that others offer: in which order they go, and how they are taken back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from narrowboat.arena.pool import PagePool
from narrowboat.tasks.execute.arrivals import Wish
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.model import TaskModel
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy import order
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.record import UNWANTED, WITHDRAWN, JobRecord

SECOND = 1_000_000


class Offered:
    """A task with a queue, whose first job holds the others up until it is let go."""

    def __init__(self, nets: Path, pool: PagePool, *, guaranteed: bool) -> None:
        self.model = TaskModel("tasks_test_nets:deep", nets / "deep.safetensors")
        count = len(self.model.units)
        self.model.arrange(pool, list(range(1, count + 1)), ())
        sizes = tuple(place.nbytes if place else 0 for place in self.model.places)
        facts = TaskFacts("deep", 0, (10_000,) * count, (10_000,) * count, sizes, 20 * SECOND, 1)
        task = Running(
            replace(facts, guaranteed=guaranteed),
            self.model,
            Source(lambda: None),
            queued=True,
            burst=50,
            jitter=10_000,
        )
        self.executor = Executor(
            [task], BlockBoundaries(order.edf), SwapSpace(pool), budget=1 << 40, compute_core=None, load_core=None
        )
        self.hold, self.held = threading.Event(), threading.Event()
        self.ended: list[tuple[Any, JobRecord]] = []
        self._all = threading.Condition()
        self.model.module.layers[0].register_forward_pre_hook(self._wait)
        self._thread = threading.Thread(target=self.executor.run, args=(None,))
        self._thread.start()

    def _wait(self, module: torch.nn.Module, inputs: Any) -> None:
        if not self.held.is_set():
            self.held.set()
            assert self.hold.wait(20)

    def offer(self, name: Any, **wish: Any) -> None:
        def then(job: JobRecord, output: Any) -> None:
            with self._all:
                self.ended.append((name, job))
                self._all.notify()

        self.executor.offer("deep", (torch.ones(1, 256),), then, Wish(**wish))

    def wait(self, count: int) -> list[Any]:
        with self._all:
            assert self._all.wait_for(lambda: len(self.ended) >= count, 20)
        return [name for name, _ in self.ended]

    def close(self) -> None:
        self.hold.set()
        self.executor.stop_requested = True
        self._thread.join(20)
        self.model.close()


@contextmanager
def offered(nets: Path, *, guaranteed: bool = False) -> Iterator[Offered]:
    pool = PagePool(4 << 20)
    made = Offered(nets, pool, guaranteed=guaranteed)
    try:
        made.offer("first")
        assert made.held.wait(20)
        yield made
    finally:
        made.close()
        pool.close()


def test_best_effort_jobs_go_by_their_rank_and_then_in_the_order_they_came(nets: Path) -> None:
    with offered(nets) as task:
        for name, rank in (("a", 0), ("b", -1), ("c", -9), ("d", 0), ("e", -9)):
            task.offer(name, rank=rank)
        task.hold.set()
        assert task.wait(6) == ["first", "c", "e", "b", "a", "d"]


def test_a_job_that_has_begun_is_not_overtaken_by_a_better_rank_of_its_own_task(nets: Path) -> None:
    with offered(nets) as task:
        task.offer("a", rank=-9)
        task.hold.set()
        assert task.wait(2) == ["first", "a"]


def test_a_job_that_was_degraded_goes_on_before_the_next_of_its_task(nets: Path) -> None:
    with offered(nets, guaranteed=True) as task:
        next(iter(task.executor._under)).degraded = True
        task.offer("a")
        task.hold.set()
        assert task.wait(2) == ["first", "a"]


def test_a_rank_changes_nothing_among_jobs_that_are_promised(nets: Path) -> None:
    with offered(nets, guaranteed=True) as task:
        for name, rank in (("a", 0), ("b", -9)):
            task.offer(name, rank=rank)
        task.hold.set()
        assert task.wait(3) == ["first", "a", "b"]


def test_a_job_that_nobody_waits_for_is_dropped_before_it_begins(nets: Path) -> None:
    with offered(nets) as task:
        task.offer("a", ticket=7)
        task.offer("b", ticket=8)
        task.executor.withdraw(7)
        assert task.wait(1) == ["a"], "at once, while another computes"
        task.hold.set()
        assert task.wait(3) == ["a", "first", "b"]
        assert (task.ended[0][1].outcome, task.ended[0][1].cause) == ("skipped", WITHDRAWN)
        assert task.ended[0][1].start is None


def test_a_job_under_way_that_nobody_waits_for_ends_at_the_next_boundary(nets: Path) -> None:
    with offered(nets) as task:
        task.offer("a")
        for under in task.executor._under.values():
            under.ticket = 5 if under.told.number == 0 else None
        task.executor.withdraw(5)
        assert not task.ended, "never in the middle of a block"
        task.hold.set()
        assert task.wait(2) == ["first", "a"]
        assert [(job.outcome, job.finish is None) for _, job in task.ended] == [("aborted", True), ("done", False)]


@pytest.mark.parametrize("patience", [1, 50_000])
def test_a_clients_own_deadline_drops_its_job_however_long_the_tasks_is(nets: Path, patience: int) -> None:
    with offered(nets) as task:
        task.offer("a", patience=patience)
        task.offer("b")
        assert task.wait(1) == ["a"]
        task.hold.set()
        assert task.wait(3) == ["a", "first", "b"]
        assert (task.ended[0][1].outcome, task.ended[0][1].cause) == ("skipped", UNWANTED)
