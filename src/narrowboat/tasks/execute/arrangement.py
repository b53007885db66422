"""Which tasks run, by which policy, with which bytes; and how one such arrangement takes the place of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from narrowboat.tasks.execute.model import Placement, TaskModel
from narrowboat.tasks.execute.running import Running
from narrowboat.tasks.execute.space import SwapSpace
from narrowboat.tasks.policy.action import Policy


@dataclass
class Arrangement:
    """All that a run can change.

    Attributes:
        tasks: in the order of their indices.
        policy: decides.
        budget: bytes over the baseline.
        pool_bytes: of it, for blocks that come and go.
        pool_least: of those, without which jobs could not go on.
        placements: of every network in use.
        setup: what is assumed, for the record.
    """

    tasks: list[Running]
    policy: Policy
    budget: int
    pool_bytes: int
    placements: Mapping[TaskModel, Placement]
    setup: dict[str, Any] = field(default_factory=dict)
    pool_least: int | None = None

    def put_in_force(self, space: SwapSpace, before: Arrangement | None = None) -> None:
        """Lay the networks out; no job may be under way. What is laid out as it should be is left alone.

        Memory that is not wanted any more goes first, so that the two are never held at once.

        Raises:
            NarrowboatError: memory or storage refuses; what is laid out then is known to the models only.
        """
        space.forget()
        for model in before.placements if before is not None else {}:
            if self.placements.get(model) != model.placement:
                model.dismantle()
        fresh = [model for model, placement in self.placements.items() if model.placement != placement]
        for model in fresh:
            model.dismantle()
        space.pool.resize(self.pool_bytes)
        space.least = self.pool_bytes if self.pool_least is None else self.pool_least
        for model in fresh:
            placement = self.placements[model]
            model.arrange(space.pool, placement.ends, placement.pins)

    def succeed(self, before: Mapping[str, Running], now: int) -> list[Running]:
        """Its tasks take the place of those of the same names; who needs a thread of its own is told.

        Args:
            before: the tasks there were, by name; those that are gone end.
            now: time of the run.
        """
        gone, need = dict(before), []
        for task in self.tasks:
            predecessor = gone.pop(task.facts.name, None)
            if predecessor is task:
                continue
            task.begin(now, predecessor)
            if task.worker is None:
                need.append(task)
        for each in gone.values():
            if each.worker is not None:
                each.worker.stop()
                each.worker = None
        return need


@dataclass(eq=False)
class Switch:
    """One arrangement is to be followed by another.

    Attributes:
        before: in force now.
        to: to be.
        allowed: microseconds that the new tasks can bear.
        done: told why it was not, or nothing, once that is known.
        patience: microseconds to wait for a moment without work.
        give_up_at: time of the run when that is over.
    """

    before: Arrangement
    to: Arrangement
    allowed: int
    done: Callable[[str], None]
    patience: int = 60_000_000
    give_up_at: int = 0
