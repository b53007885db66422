"""Discrete events: two engines, one policy, jobs whose costs vary. The policy is the run-time's own object."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from narrowboat.tasks.job import Job, TaskFacts
from narrowboat.tasks.policy.action import Action, Do, Engine, Policy, View, held_bytes
from narrowboat.tasks.record import JobRecord, Record, Segment

_LIVELOCK = 10_000  # decisions at one instant


class Costs(Protocol):
    """How long things really take, in the simulation's unit of time."""

    def load(self, job: Job | None, task: TaskFacts, block: int) -> int:
        """To load a block."""

    def compute(self, job: Job, block: int) -> int:
        """To compute a block."""

    def move(self, nbytes: int) -> int:
        """To swap bytes by volume."""


@dataclass
class WorstCosts:
    """Everything takes as long as it may.

    Attributes:
        bytes_per_unit: moved by volume in one unit of time.
    """

    bytes_per_unit: float = 1.0

    def load(self, job: Job | None, task: TaskFacts, block: int) -> int:
        """To load a block."""
        return task.loads[block]

    def compute(self, job: Job, block: int) -> int:
        """To compute a block."""
        return job.task.computes[block]

    def move(self, nbytes: int) -> int:
        """To swap bytes by volume."""
        return -int(-nbytes // self.bytes_per_unit)


@dataclass
class VaryingCosts:
    """Anything up to the worst case.

    Attributes:
        up_to: given the most something may take, what it takes.
    """

    up_to: Callable[[int], int]

    def load(self, job: Job | None, task: TaskFacts, block: int) -> int:
        """To load a block."""
        return self.up_to(task.loads[block])

    def compute(self, job: Job, block: int) -> int:
        """To compute a block."""
        return self.up_to(job.task.computes[block])

    def move(self, nbytes: int) -> int:
        """To swap bytes by volume."""
        return self.up_to(nbytes)


def periodic(tasks: Sequence[TaskFacts], until: int, offsets: Sequence[int] = ()) -> Iterator[tuple[int, TaskFacts]]:
    """Releases at ``offset + k * period`` for all tasks, in order, before ``until``."""
    queue = [(offset, task.index, task) for task, offset in zip(tasks, offsets or [0] * len(tasks), strict=True)]
    heapq.heapify(queue)
    while queue:
        when, index, task = heapq.heappop(queue)
        if when < until:
            yield when, task
            heapq.heappush(queue, (when + task.period, index, task))


class Simulation:
    """One run.

    Args:
        policy: decides.
        costs: how long things take.
        chunk: time within which a prefetch that is given up ends.
        budget: bytes for what is swapped, activations included; None for no count.
        overhead: time of a boundary, added to whatever begins there.
    """

    def __init__(
        self, policy: Policy, costs: Costs, *, chunk: int = 1, budget: int | None = None, overhead: int = 0
    ) -> None:
        self.policy, self.costs, self.chunk, self.budget, self.overhead = policy, costs, chunk, budget, overhead
        self.record = Record()
        self._view = View(0)
        self._ends: dict[Engine, tuple[int, int]] = {}  # engine: begin, end of what it is at
        self._of: dict[Job, JobRecord] = {}
        self._ran: Job | None = None
        self._numbers: dict[str, int] = {}
        self._aborted = False

    def run(self, releases: Iterable[tuple[int, TaskFacts]]) -> Record:
        """All releases, until the last job has ended."""
        coming = iter(releases)
        following = next(coming, None)
        view = self._view
        while True:
            view.upcoming = following[1] if following is not None else None
            self._decide()
            instants = [end for _, end in self._ends.values()]
            if following is not None:
                instants.append(following[0])
            if not instants:
                break
            view.now = max(min(instants), view.now)
            for engine in (Engine.LOAD, Engine.COMPUTE):
                if engine in self._ends and self._ends[engine][1] <= view.now:
                    self._finish(engine)
            while following is not None and following[0] <= view.now:
                self._release(*following)
                following = next(coming, None)
        self.record.end = view.now
        self.record.jobs = sorted(self.record.jobs, key=lambda job: (job.release, job.task))
        return self.record

    def _release(self, when: int, task: TaskFacts) -> None:
        number = self._numbers[task.name] = self._numbers.get(task.name, -1) + 1
        job = Job(task, number, when)
        self._of[job] = JobRecord(task.name, number, when, job.due)
        self.record.jobs.append(self._of[job])
        self._view.pending.append(job)

    def _decide(self) -> None:
        for _ in range(_LIVELOCK):
            self._view.free_bytes = None if self.budget is None else self.budget - held_bytes(self._view)
            actions = self.policy.choose(self._view)
            if not actions:
                return
            for action in actions:
                self._start(action)
            self._account()
            # What takes no time has ended already.
            for engine in (Engine.LOAD, Engine.COMPUTE):
                if engine in self._ends and self._ends[engine][1] <= self._view.now:
                    self._finish(engine)
        raise RuntimeError(f"the policy {type(self.policy).__name__} goes in circles at time {self._view.now}")

    def _start(self, action: Action) -> None:
        view, now, engine = self._view, self._view.now, action.do.engine
        if action.do is Do.ABORT:
            begin, end = self._ends[engine]
            over = (now - begin) % self.chunk
            self._ends[engine] = begin, min(end, now + (self.chunk - over if over else 0))
            self._aborted = True
            view.doing[engine] = Action(Do.LOAD, action.task)  # nobody gives it up twice
            return
        if action.do is Do.ADOPT:
            assert action.job is not None
            view.doing[engine] = Action(Do.LOAD, action.task, action.job)
            self._begin(action.job)
            return
        if engine in view.doing:
            raise RuntimeError(f"the {engine.value} engine is at {view.doing[engine]} and cannot begin {action}")
        if action.do is not Do.PREFETCH and view.prefetched is not None and Engine.LOAD not in view.doing:
            self._use_prefetched(action)
        view.doing[engine] = action
        self._ends[engine] = now, now + self._time(action)
        if action.job is not None and action.do in (Do.LOAD, Do.COMPUTE, Do.RUN):
            self._begin(action.job)
            if action.do is Do.COMPUTE:
                action.job.loaded = max(action.job.loaded, action.block + 1)

    def _use_prefetched(self, action: Action) -> None:
        """A boundary: the block loaded ahead is the job's, or is dropped for another's."""
        if action.job is not None and action.job.task is self._view.prefetched and action.job.untouched:
            action.job.loaded = 1
        self._view.prefetched = None

    def _begin(self, job: Job) -> None:
        told = self._of[job]
        if job.started is None:
            job.started = told.start = self._view.now
        if self._ran is not None and self._ran is not job and not self._ran.finished:
            self._of[self._ran].preemptions += 1
        self._ran = job

    def _time(self, action: Action) -> int:
        overhead = 0 if action.do in (Do.PREFETCH, Do.SWAP_IN, Do.SWAP_OUT) else self.overhead
        if action.do in (Do.LOAD, Do.PREFETCH):
            return overhead + self.costs.load(action.job, action.task, action.block)
        if action.do in (Do.SWAP_IN, Do.SWAP_OUT):
            return self.costs.move(action.nbytes)
        assert action.job is not None
        blocks = range(action.job.task.blocks) if action.do is Do.RUN else (action.block,)
        return overhead + sum(self.costs.compute(action.job, block) for block in blocks)

    def _finish(self, engine: Engine) -> None:
        view = self._view
        action, (begin, _) = view.doing.pop(engine), self._ends.pop(engine)
        job = action.job
        self.record.segments.append(
            Segment(
                engine.value,
                "abort" if self._aborted and engine is Engine.LOAD else action.do.value,
                action.task.name,
                job.number if job is not None else -1,
                action.block,
                begin,
                view.now,
                action.nbytes,
            )
        )
        if self._aborted and engine is Engine.LOAD:
            self._aborted = False
        elif action.do is Do.PREFETCH:
            view.prefetched = action.task
        elif action.do is Do.LOAD and job is not None:
            job.loaded = max(job.loaded, action.block + 1)
        elif action.do in (Do.COMPUTE, Do.RUN) and job is not None:
            job.computed = job.task.blocks if action.do is Do.RUN else action.block + 1
            if job.finished:
                view.pending.remove(job)
                told = self._of.pop(job)
                told.finish = view.now
                told.outcome = "done" if told.finish <= told.due else "late"
                told.cause = "" if told.outcome == "done" else "overload"
        self.policy.ended(action, view.now)
        self._account()

    def _account(self) -> None:
        held = held_bytes(self._view)
        if not self.record.memory or self.record.memory[-1][1] != held:
            self.record.memory.append((self._view.now, held))
