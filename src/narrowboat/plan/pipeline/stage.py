"""What one node would make of one stretch of the model: a plan within its budget, and the times of its passes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from narrowboat.errors import BudgetError
from narrowboat.plan.make import make_plan, minimum_budget
from narrowboat.plan.model import PAGE, Block, Workload
from narrowboat.plan.pipeline.model import Chain, Node
from narrowboat.plan.pipeline.recurrence import StageTime
from narrowboat.plan.result import Plan
from narrowboat.plan.timing import simulate


@dataclass(frozen=True, slots=True)
class Stage:
    """One node's part.

    Attributes:
        node: its name.
        begin, end: the pieces ``[begin, end)``.
        budget: bytes for its session: the node's, without what waits in its queue.
        queue_bytes: those.
        plan: the session's, as foreseen.
        time: of its passes.
    """

    node: str
    begin: int
    end: int
    budget: int
    queue_bytes: int
    plan: Plan
    time: StageTime


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not.

    Attributes:
        minimum: the smallest budget in bytes with which the node could.
        limiter: the layer that sets it.
    """

    minimum: int
    limiter: str


def stage_workload(chain: Chain, begin: int, end: int) -> Workload:
    """The pieces ``[begin, end)`` one after the other; their peaks do not come together, what they keep does."""
    blocks: list[Block] = []
    seconds: list[float] = []
    busy: list[float] = []
    peak = kept = 0
    for piece in chain.pieces[begin:end]:
        work, at = piece.workload, len(seconds)
        blocks += [replace(b, holds=tuple((f + at, last + at) for f, last in b.holds)) for b in work.blocks]
        seconds += work.step_seconds
        busy += work.busy_seconds
        peak = max(peak, work.fixed_bytes)
        kept += piece.kept_bytes
    parts = (("activations", peak), ("buffers", kept))
    return Workload(
        tuple(blocks), tuple(seconds), peak + kept, parts, tuple(busy) if len(busy) == len(seconds) else ()
    )


class Stages:
    """All stages there could be, each made when it is asked for.

    Args:
        chain: the model.
        nodes: those there are.
        in_flight: most inputs on their way at once; in the worst case all but one wait in front of one stage.
    """

    def __init__(self, chain: Chain, nodes: tuple[Node, ...], in_flight: int) -> None:
        self.chain, self.nodes, self.in_flight = chain, nodes, in_flight
        pieces = chain.pieces
        self._seconds = list(accumulate((sum(p.workload.step_seconds) for p in pieces), initial=0.0))
        self._reads = list(accumulate((sum(b.read_bytes for b in p.workload.blocks) for p in pieces), initial=0))
        self.workload = cache(lambda begin, end: stage_workload(chain, begin, end))
        self.least = cache(lambda begin, end: minimum_budget(self.workload(begin, end)))
        self.get = cache(self._make)

    def queue_bytes(self, begin: int, end: int) -> int:
        """What waits in front of a stage, and what it has made and is sending."""
        return (self.in_flight - 1) * self.chain.crossing(begin) + self.chain.crossing(end)

    def needs(self, begin: int, end: int) -> tuple[int, str]:
        """The smallest budget of a node for this stretch, without its staging, and what sets it."""
        least, limiter = self.least(begin, end)
        return least + self.queue_bytes(begin, end), limiter

    def at_least(self, node: int, begin: int, end: int) -> float:
        """Seconds that no pass of this stage can be shorter than; quick."""
        at = self.nodes[node]
        compute = (self._seconds[end] - self._seconds[begin]) * at.pace
        reads = self._reads[end] - self._reads[begin] - at.budget
        return max(compute, reads / at.machine.bandwidth)

    def _make(self, node: int, begin: int, end: int) -> Stage | Refusal:
        at = self.nodes[node]
        queue = self.queue_bytes(begin, end)
        budget = at.budget - queue - at.staging
        least, limiter = self.least(begin, end)
        if budget < least:
            return Refusal(least + queue + at.staging, limiter)
        work = self.workload(begin, end)
        if at.pace != 1.0:
            work = replace(
                work,
                step_seconds=tuple(s * at.pace for s in work.step_seconds),
                busy_seconds=tuple(s * at.pace for s in work.busy_seconds),
            )
        try:
            plan = make_plan(work, at.machine, budget)
        except BudgetError as error:
            return Refusal(error.minimum + queue + at.staging, error.limiter)
        return Stage(at.name, begin, end, budget + at.staging, queue, plan, pass_times(plan, work))


def pass_times(plan: Plan, workload: Workload) -> StageTime:
    """Both times of a plan's passes."""
    work = replace(workload, blocks=plan.blocks)
    places = [plan.offsets[i] for i in plan.streamed]
    times = [
        simulate(
            replace(work, from_idle=rested), plan.machine, plan.resident, plan.streamed, places, cached=plan.cached
        ).latency
        for rested in (True, False)
    ]
    return StageTime(min(times), times[1])


def page_up(nbytes: int) -> int:
    """The next whole page."""
    return -(-nbytes // PAGE) * PAGE
