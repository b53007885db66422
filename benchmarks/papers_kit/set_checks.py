"""Random task sets that demand more memory than there is: who admits how many, and whether promises are kept."""

from __future__ import annotations

import random
from collections.abc import Sequence

from narrowboat.errors import TaskSpecError
from narrowboat.tasks.admission import admit
from narrowboat.tasks.costed import CostedTask, facts_of, priorities
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.policy.order import ORDERS
from narrowboat.tasks.policy.volume import VolumeSwap
from narrowboat.tasks.simulate import Simulation, VaryingCosts, WorstCosts, periodic
from narrowboat.tasks.spec.rtswap import parse_rtswap
from narrowboat.tasks.spec.schema import TasksSpec
from papers_kit.check import Bench, Measurement
from tasks_kit.admitted import METHODS, Method, _holds
from tasks_kit.sets import Shape, random_set

_SEED = 20261123
DEMAND = 1.962  # RT-Swap's 96.2 % more than there is
_HORIZON = 40_000_000  # microseconds
OURS = "narrowboat"


def no_swap(tasks: Sequence[CostedTask], settings: TasksSpec) -> bool:
    """Everything has to be resident."""
    from narrowboat.tasks.analysis.model import Block

    total = sum(sum(u.nbytes for u in task.units) + task.activation_bytes for task in tasks)
    chains = [[Block(0, sum(u.compute for u in task.units))] for task in tasks]
    return total <= settings.budget and _holds(chains, tasks, settings)


RIVALS: dict[str, Method] = {
    "no swapping": no_swap,
    "demand paging": METHODS["demand paging"],
    "whole models": METHODS["whole models"],
    "RT-Swap's rules": METHODS["RT-Swap's rules"],
}


def schedulable(bench: Bench) -> Measurement:
    """The share of random sets that each way admits, over the demand for memory."""
    effort = bench.effort
    shares: dict[str, list[float]] = {name: [] for name in (OURS, *RIVALS)}
    for demand in effort.demands:
        sets = [random_set(Shape(demand=demand), _SEED + k) for k in range(effort.sets)]
        for name, method in {OURS: METHODS[OURS], **RIVALS}.items():
            shares[name].append(sum(method(*each) for each in sets) / effort.sets)
        bench.say(f"demand {demand}: " + ", ".join(f"{name} {found[-1]:.0%}" for name, found in shares.items()))
    return {"demands": list(effort.demands), "shares": shares, "sets": effort.sets} | told_of(
        {name: found[effort.demands.index(DEMAND)] for name, found in shares.items()}
    )


def told_of(shares: dict[str, float]) -> Measurement:
    """What the claims need of the shares at RT-Swap's demand; pure."""
    rivals = {name: share for name, share in shares.items() if name != OURS}
    best = max(rivals, key=lambda name: rivals[name])
    existing = max(share for name, share in rivals.items() if name != "RT-Swap's rules")
    ours, rules = shares[OURS], shares["RT-Swap's rules"]
    return {
        "ours": ours,
        "rules": rules,
        "best_rival": best,
        "best_share": rivals[best],
        "gain": ours / rivals[best] - 1 if rivals[best] else float("inf"),
        "rules_gain": rules / existing - 1 if existing else float("inf"),
        "told": ", ".join(f"{name} {share:.0%}" for name, share in shares.items()),
        "some_admitted": ours > 0,
    }


def promises(bench: Bench) -> Measurement:
    """Admitted sets at RT-Swap's demand, simulated with random costs: does any job pass its bound or its deadline?"""
    done = sets = over = missed = beyond = 0
    nearest, number = 0.0, _SEED
    while done < bench.effort.jobs:
        number += 1
        rng = random.Random(number)
        shape = Shape(utilisation=rng.uniform(0.2, 0.5), demand=DEMAND, load=rng.uniform(0.1, 0.7))
        tasks, settings = random_set(shape, number)
        verdict = admit(tasks, settings)
        if not verdict.admitted:
            continue
        sets += 1
        levels = priorities(tasks)
        facts = [facts_of(task, k, levels[task.name]) for k, task in enumerate(tasks)]
        policy = BlockBoundaries(ORDERS[settings.policy], preempt=settings.preemption == "lp-keep")
        costs = VaryingCosts(lambda most, rng=rng: most if rng.random() < 0.5 else rng.randint(0, most))
        record = Simulation(policy, costs).run(periodic(facts, _HORIZON))
        bounds = {task.name: task.bound or 0 for task in verdict.tasks}
        for name, times in record.responses().items():
            done += len(times)
            over += sum(response > bounds[name] for response in times)
            nearest = max(nearest, max(times) / bounds[name])
        missed += sum(job.outcome != "done" for job in record.jobs)
        beyond += max(held for _, held in record.memory) > verdict.needed_bytes
    return {
        "jobs": done,
        "sets": sets,
        "over": over,
        "missed": missed,
        "nearest": nearest,
        "no_bound_passed": over == 0,
        "no_deadline_missed": missed == 0,
        "no_memory_beyond": beyond == 0,
        **_overload(),
    }


def _overload() -> Measurement:
    """A set that cannot be served, under RT-Swap's rules: are late jobs told as late?"""
    facts = [TaskFacts(f"t{k}", k, (0,), (70,), (10,), 100, 100, swap_bytes=10) for k in range(2)]
    record = Simulation(VolumeSwap(facts, 10), WorstCosts()).run(periodic(facts, 2_000))
    late = sum(job.outcome == "late" for job in record.jobs)
    return {"late": late, "late_are_told": late > 0 and all(job.cause for job in record.jobs if job.outcome == "late")}


def configuration(bench: Bench) -> Measurement:
    """RT-Swap's sample configuration is read, and broken lines are refused with their number."""
    (line,) = parse_rtswap("5,500,2097152,1,0\n")
    (other,) = parse_rtswap("0,600,0\n", variant="darknet")
    broken = ("5,500,2097152,2,0", "5,0,2097152,0", "5,x,1,0", "5,500")
    told = []
    for text in broken:
        try:
            parse_rtswap("5,500,2097152,1,0\n" + text, "config")
        except TaskSpecError as error:
            told.append(str(error).startswith("config:2: "))
    read = (line.model_type, line.period_ms, line.max_swap_volume, line.objects) == (5, 500, 2_097_152, (0,))
    return {
        "sample_read": read and other.max_swap_volume is None and other.period_ms == 600,
        "refused": sum(told),
        "broken": len(broken),
        "refused_with_line": len(told) == len(broken) and all(told),
    }
