"""Simulated jobs of admitted sets with random costs: does any exceed its bound; and how long admission takes."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from narrowboat.tasks.admission import admit
from narrowboat.tasks.costed import facts_of, priorities
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.policy.order import ORDERS
from narrowboat.tasks.simulate import Simulation, VaryingCosts, periodic
from tasks_kit.sets import Shape, random_set


def _costs(rng: random.Random) -> VaryingCosts:
    """Anything up to the worst case; often just that."""
    return VaryingCosts(lambda most: most if rng.random() < 0.5 else rng.randint(0, most))


def soundness(jobs: int, seed: int) -> dict[str, Any]:
    """Simulate sets that are admitted until that many jobs have ended."""
    done = sets = over = missed = beyond = 0
    nearest = 0.0
    number = seed
    while done < jobs:
        number += 1
        rng = random.Random(number)
        shape = Shape(utilisation=rng.uniform(0.2, 0.6), demand=rng.uniform(0.8, 1.6), load=rng.uniform(0.1, 0.9))
        tasks, settings = random_set(shape, number)
        settings = settings.model_copy(
            update={"policy": rng.choice(["edf", "fp"]), "preemption": rng.choice(["lp-keep", "np"])}
        )
        verdict = admit(tasks, settings)
        if not verdict.admitted:
            continue
        sets += 1
        levels = priorities(tasks)
        facts = [facts_of(task, k, levels[task.name]) for k, task in enumerate(tasks)]
        policy = BlockBoundaries(ORDERS[settings.policy], preempt=settings.preemption == "lp-keep")
        offsets = [rng.choice([0, rng.randint(0, fact.period)]) for fact in facts]
        record = Simulation(policy, _costs(rng)).run(periodic(facts, 40_000_000, offsets))
        bounds = {task.name: task.bound or 0 for task in verdict.tasks}
        for name, times in record.responses().items():
            done += len(times)
            over += sum(response > bounds[name] for response in times)
            nearest = max(nearest, max(times) / bounds[name])
        missed += sum(job.outcome == "late" for job in record.jobs)
        beyond += max(held for _, held in record.memory) > verdict.needed_bytes
    return {
        "jobs": done,
        "sets": sets,
        "over_bound": over,
        "missed": missed,
        "sets_beyond_memory": beyond,
        "largest_response_over_bound": round(nearest, 4),
    }


def admission_times(seed: int, count: int = 20, sets: int = 50) -> dict[str, Any]:
    """Milliseconds to judge sets of that many tasks."""
    shape = Shape(tasks=count, units=6, utilisation=0.5, demand=1.2)
    times = []
    for k in range(sets):
        tasks, settings = random_set(shape, seed + k)
        start = time.perf_counter()
        admit(tasks, settings)
        times.append((time.perf_counter() - start) * 1e3)
    return {
        "tasks": count,
        "sets": sets,
        "median_ms": round(statistics.median(times), 2),
        "worst_ms": round(max(times), 2),
    }
