"""Random sets of swapped tasks, for the tests of analysis, policies and simulator."""

from __future__ import annotations

import random

from narrowboat.tasks.analysis.model import Arrival, Block, Task
from narrowboat.tasks.analysis.pipeline import segments
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.simulate import VaryingCosts


def random_costs(rng: random.Random, least: float = 0.0) -> VaryingCosts:
    """Anything from that share of the worst case up to it."""
    return VaryingCosts(lambda most: rng.randint(int(least * most), most))


def facts(task: Task, index: int, blocks: list[Block], activation_bytes: int = 0, **more: object) -> TaskFacts:
    period, priority = task.arrival.period, task.priority
    return TaskFacts.of_blocks(
        task.name, index, blocks, task.deadline, period, priority=priority, activation_bytes=activation_bytes, **more
    )


def random_set(
    seed: int, count: int, utilisation: float, overhead: int = 0
) -> tuple[list[Task], list[TaskFacts], list[list[Block]]]:
    """Tasks of up to five blocks with that utilisation in all, about."""
    rng = random.Random(seed)
    tasks: list[Task] = []
    everything: list[TaskFacts] = []
    cut: list[list[Block]] = []
    for index in range(count):
        blocks = [
            Block(rng.choice([0, rng.randint(1, 9)]), rng.randint(1, 9), rng.randint(1, 50))
            for _ in range(rng.randint(1, 5))
        ]
        chain = segments(blocks, overhead)
        period = max(int(sum(chain) * count / utilisation * rng.uniform(0.6, 1.6)), 1)
        deadline = rng.randint(min(sum(chain), period), period)
        task = Task(f"t{index}", chain, Arrival(period), deadline, rng.randint(0, 3))
        tasks.append(task)
        everything.append(facts(task, index, blocks, rng.randint(0, 20)))
        cut.append(blocks)
    return tasks, everything, cut
