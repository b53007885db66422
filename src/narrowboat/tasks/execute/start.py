"""Begin a run as admission arranged it: the pool, every network's blocks and pins, the tasks; then tell the record."""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowboat.arena.pool import PagePool
from narrowboat.errors import ExecutorError
from narrowboat.machine.malloc import trim
from narrowboat.machine.memory import reset_peak
from narrowboat.quantities import format_bytes
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.inputs import source_of
from narrowboat.tasks.execute.load_models import Loaded
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.policy.order import ORDERS
from narrowboat.tasks.record import Record
from narrowboat.tasks.spec.load import tasks_from
from narrowboat.tasks.spec.schema import TaskSpec

if TYPE_CHECKING:
    from narrowboat.tasks.execute.child import Pipe


def run(request: dict[str, Any], pipe: Pipe) -> None:
    """Run the tasks of a request, and tell when it is done.

    Args:
        request: ``settings``, ``folder``, ``tasks`` (facts, ends and pins by task), ``pool_bytes``, ``policy``,
            ``seconds``, ``record`` (where to write it).
        pipe: to whoever asked.
    """
    settings = tasks_from(request["settings"])
    folder = Path(request["folder"])
    loaded = Loaded(settings, folder, lambda said: pipe.tell("progress", said=said))
    pool = PagePool(request["pool_bytes"], lock=True)
    space = SwapSpace(pool)
    arranged: set[int] = set()
    tasks = []
    for spec in settings.tasks:
        given = request["tasks"][spec.name]
        model = loaded.of[spec.name]
        if id(model) not in arranged:
            arranged.add(id(model))
            model.arrange(pool, given["ends"], given["pins"])
        facts = _facts(given["facts"])
        there = tuple(place.nbytes if place is not None else 0 for place in model.places)
        if there != facts.nbytes:
            raise ExecutorError(
                f"task {spec.name!r} has other blocks than were admitted: its model has changed; try again"
            )
        source = source_of(spec.input, model.request.resolved, model.inputs, folder)
        tasks.append(Running(facts, model, source, spec.offset, _burst(spec), spec.overrun))
    executor = Executor(
        tasks,
        BlockBoundaries(
            ORDERS[settings.policy], preempt=settings.preemption == "lp-keep", prefetch=request["prefetch"]
        ),
        space,
        budget=settings.budget,
        baseline=loaded.baseline,
        compute_core=settings.compute_core,
        load_core=settings.load_core,
        on_tick=_watched_from_aside(pipe),
    )
    pipe.tell("progress", said="warming up")
    _warm_up(tasks, space, executor)
    trim()
    reset_peak()
    threading.Thread(target=_listen, args=(executor,), daemon=True).start()
    pipe.tell("started", real_time=executor.granted.as_json())
    record = executor.run(request["seconds"])
    record.setup = request["setup"]
    record.premises["peak_over_budget_bytes"] = max(record.premises["peak_bytes"] - settings.budget, 0)
    record.save(request["record"])
    if record.premises["peak_bytes"] > settings.budget:
        pipe.tell("progress", said=f"the peak was {format_bytes(record.premises['peak_bytes'])}, over the budget")
    pool.close()
    pipe.tell("done")


def _watched_from_aside(pipe: Pipe) -> Callable[[dict[str, Any]], None]:
    """Tell pictures from a thread of its own: a reader that is slow costs pictures, and never a deadline."""
    latest: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=1)

    def show(picture: dict[str, Any]) -> None:
        with contextlib.suppress(queue.Full):
            latest.put_nowait(picture)

    def tell() -> None:
        while True:
            pipe.tell("tick", **latest.get())

    threading.Thread(target=tell, name="narrowboat-teller", daemon=True).start()
    return show


def _warm_up(tasks: list[Running], space: SwapSpace, executor: Executor) -> None:
    """Every task twice, by itself: kernels, packing, and the heap as it will be."""
    for task in tasks:
        alone = Running(task.facts, task.model, task.source, closed_loop=True)
        policy = BlockBoundaries(ORDERS["edf"])
        record: Record = Executor([alone], policy, space, budget=executor.budget, baseline=executor.baseline).run(
            None, jobs=2
        )
        failed = next((job.cause for job in record.jobs if job.outcome == "failed"), None)
        if failed is not None:
            raise ExecutorError(f"task {task.facts.name!r} fails when it runs alone: {failed}")


def _facts(told: dict[str, Any]) -> TaskFacts:
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
    return TaskFacts(**plain)


def _burst(spec: TaskSpec) -> int:
    if spec.contract is not None:
        return spec.contract.burst
    return 1 + -(-spec.jitter // spec.step)


def _listen(executor: Executor) -> None:
    """Whoever asked may end the run; and if it is gone, so are we."""
    for line in sys.stdin:
        if json.loads(line).get("do") == "stop":
            executor.stop_requested = True
            return
    executor.stop_requested = True
