"""Begin a run as admission arranged it: the pool, every network's blocks and pins, the tasks; then tell the record."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowboat.errors import ExecutorError
from narrowboat.quantities import format_bytes
from narrowboat.tasks.execute.arrangement import Arrangement
from narrowboat.tasks.execute.asked import arrangement_of, forms_of
from narrowboat.tasks.execute.exchange import Exchange
from narrowboat.tasks.execute.executor import Executor
from narrowboat.tasks.execute.figures import major_faults
from narrowboat.tasks.execute.ground import Ground
from narrowboat.tasks.execute.inputs import Source
from narrowboat.tasks.execute.listen import Listener
from narrowboat.tasks.execute.load_models import Loaded
from narrowboat.tasks.execute.picture import plain
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.serve_jobs import JobServer
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.policy.order import ORDERS
from narrowboat.tasks.record import Record
from narrowboat.tasks.spec.load import tasks_from

if TYPE_CHECKING:
    from narrowboat.tasks.execute.child import Pipe


def run(request: dict[str, Any], pipe: Pipe, exchange: Exchange) -> None:
    """Run the tasks of a request, and tell when it is done.

    Args:
        request: ``settings``, ``folder``, ``tasks`` (facts, ends and pins by task), ``pool_bytes``, ``prefetch``,
            ``setup``, ``seconds``, ``keep`` (of the record, None for all), ``forms`` (of jobs from outside, by
            number); on a device ``mirrors``: what is in host memory, by task.
        pipe: to whoever asked.
        exchange: with whoever asked.
    """
    settings = tasks_from(request["settings"])
    folder = Path(request["folder"])
    loaded = Loaded(settings, folder, lambda said: pipe.tell("progress", said=said), request["mirrors"])
    ground = loaded.ground
    space = SwapSpace(ground.pool(request["pool_bytes"]))
    ground.check(settings.budget)
    for model in loaded.of.values():
        ground.prepare(model)
    first = arrangement_of(request, loaded.of, folder)
    first.put_in_force(space)
    executor = Executor(
        first.tasks,
        first.policy,
        space,
        budget=first.budget,
        ground=ground,
        compute_core=settings.compute_core,
        load_core=settings.load_core,
        on_tick=_watched_from_aside(exchange),
        keep=request["keep"],
    )
    ground.limit(first.budget, first.pool_bytes)
    pipe.tell("progress", said="warming up")
    _warm_up(first, space, ground)
    if ground.device is None:
        ground.clear()  # a device's allocator keeps what it has: taking it anew would hold jobs up
    ground.reset_peak()
    executor.account.record.setup = first.setup
    jobs = JobServer(executor, exchange, forms_of(request))
    jobs.start()
    Listener(executor, first, loaded, jobs, pipe).start()
    pipe.tell("started", real_time=executor.granted.as_json())
    record = executor.run(request["seconds"])
    jobs.settle()
    peak = record.premises["peak_bytes"]
    record.premises["peak_over_budget_bytes"] = max(peak - executor.account.budget, 0)
    if peak > executor.account.budget:
        pipe.tell("progress", said=f"the peak was {format_bytes(peak)}, over the budget")
    space.pool.close()
    pipe.tell("done", record=record.as_json() if request["keep"] is None else None)


def _watched_from_aside(exchange: Exchange) -> Callable[[Callable[[], dict[str, Any]]], None]:
    """Tell pictures from a thread of its own: a reader that is slow costs pictures, and never a deadline."""
    latest: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=1)

    def show(make: Callable[[], dict[str, Any]]) -> None:
        if latest.empty():  # what has happened meanwhile is told with the next
            latest.put_nowait(make())

    def tell() -> None:
        seen = latest.get()
        faults = major_faults()
        while True:
            message = json.dumps(plain(seen, faults)).encode()
            while len(message) <= exchange.events.most and not exchange.events.put(message, timeout=1.0):
                pass  # its news are told once: it waits, and those after it grow
            seen = latest.get()

    threading.Thread(target=tell, name="narrowboat-teller", daemon=True).start()
    return show


def _warm_up(arrangement: Arrangement, space: SwapSpace, ground: Ground) -> None:
    """Every task twice, by itself: kernels, packing, and the heap as it will be."""
    for task in arrangement.tasks:
        inputs = task.model.inputs
        source = Source(lambda inputs=inputs: inputs) if task.queued else task.source  # type: ignore[misc]
        alone = Running(task.facts, task.model, source, closed_loop=True)
        policy = BlockBoundaries(ORDERS["edf"])
        record: Record = Executor([alone], policy, space, budget=arrangement.budget, ground=ground).run(None, jobs=2)
        failed = next((job.cause for job in record.jobs if job.outcome == "failed"), None)
        if failed is not None:
            raise ExecutorError(f"task {task.facts.name!r} fails when it runs alone: {failed}")
