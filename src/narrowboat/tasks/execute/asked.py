"""From what a request says to an arrangement of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narrowboat.errors import ExecutorError
from narrowboat.tasks.costed import arrival_of, burst_of
from narrowboat.tasks.execute.arrangement import Arrangement
from narrowboat.tasks.execute.inputs import source_of
from narrowboat.tasks.execute.model import Placement, TaskModel
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.policy.order import ORDERS
from narrowboat.tasks.spec.load import tasks_from
from narrowboat.tasks.tensors import Signature


def arrangement_of(
    request: Mapping[str, Any],
    models: Mapping[str, TaskModel],
    folder: Path,
    before: Arrangement | None = None,
) -> Arrangement:
    """What a request asks for; nothing is laid out yet.

    Args:
        request: see :func:`run`.
        models: the network of each task.
        folder: that paths are meant from.
        before: whose sources of inputs go on where they are, for tasks that ask for the same.

    Raises:
        ExecutorError: a network has changed since it was admitted.
        TaskSpecError: inputs cannot be used.
    """
    settings = tasks_from(request["settings"])
    earlier = {(task.facts.name, task.asked_for): task.source for task in (before.tasks if before is not None else ())}
    tasks, placements = [], dict[TaskModel, Placement]()
    for spec in settings.tasks:
        given, model = request["tasks"][spec.name], models[spec.name]
        placement = placements.setdefault(model, Placement(tuple(given["ends"]), frozenset(given["pins"])))
        facts = _facts(given["facts"])
        if model.block_bytes(placement) != facts.nbytes:
            raise ExecutorError(
                f"task {spec.name!r} has other blocks than were admitted: its model has changed; try again"
            )
        asked_for = (spec.model, spec.weights, spec.input)
        source = earlier.get((spec.name, asked_for)) or source_of(
            spec.input, model.request.resolved, model.inputs, folder
        )
        tasks.append(
            Running(
                facts,
                model,
                source,
                spec.offset,
                burst_of(spec),
                spec.overrun,
                queued=spec.input is not None and spec.input.queue is not None,
                jitter=arrival_of(spec).jitter,
                asked_for=asked_for,
            )
        )
    policy = BlockBoundaries(
        ORDERS[settings.policy], preempt=settings.preemption == "lp-keep", prefetch=request["prefetch"]
    )
    return Arrangement(
        tasks, policy, settings.budget, request["pool_bytes"], placements, request["setup"], request["pool_least"]
    )


def forms_of(request: Mapping[str, Any]) -> dict[int, Signature]:
    """How jobs are written that come from outside: what they take and give, by the number of the form."""
    return {int(number): Signature.from_json(told) for number, told in request["forms"].items()}


def _facts(told: dict[str, Any]) -> TaskFacts:
    plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()}
    return TaskFacts(**plain)
