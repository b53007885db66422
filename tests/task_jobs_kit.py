"""Random sets of swapped tasks, for the tests of analysis, policies and simulator."""

from __future__ import annotations

import random
from dataclasses import dataclass

from narrowboat.tasks.analysis.model import Arrival, Block, Task
from narrowboat.tasks.analysis.pipeline import segments
from narrowboat.tasks.job import Job, TaskFacts


@dataclass
class RandomCosts:
    """Anything up to the worst case."""

    random: random.Random
    least: float = 0.0

    def _some(self, most: int) -> int:
        return self.random.randint(int(self.least * most), most)

    def load(self, job: Job | None, task: TaskFacts, block: int) -> int:
        return self._some(task.loads[block])

    def compute(self, job: Job, block: int) -> int:
        return self._some(job.task.computes[block])

    def move(self, nbytes: int) -> int:
        return self._some(nbytes)


def facts(task: Task, index: int, blocks: list[Block], activation_bytes: int = 0, **more: object) -> TaskFacts:
    return TaskFacts(
        task.name,
        index,
        tuple(block.load for block in blocks),
        tuple(block.compute for block in blocks),
        tuple(block.nbytes for block in blocks),
        task.deadline,
        task.arrival.period,
        task.priority,
        activation_bytes=activation_bytes,
        **more,  # type: ignore[arg-type]
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
