"""``nb.TaskSet``: load a description, ask whether it holds, simulate it, run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowboat.errors import AdmissionError, UsageError
from narrowboat.machine.about import about
from narrowboat.tasks.admission import DEFAULT_CHUNK, Verdict, admit
from narrowboat.tasks.allocate import Allocation, allocate, as_described
from narrowboat.tasks.costed import CostedTask, always_bytes, arrival_of, described, facts_of, prefetches, priorities
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.policy.boundaries import BlockBoundaries
from narrowboat.tasks.policy.order import ORDERS
from narrowboat.tasks.record import Record
from narrowboat.tasks.simulate import Costs, Simulation, WorstCosts, periodic
from narrowboat.tasks.spec.load import load_tasks, tasks_from
from narrowboat.tasks.spec.schema import TasksSpec
from narrowboat.tasks.suggest import suggestions

if TYPE_CHECKING:
    from narrowboat.tasks.live import LiveRun


class TaskSet:
    """Tasks that share one budget.

    Args:
        settings: what was asked for.
        folder: that relative paths are meant from.

    Attributes:
        tell: called with what takes long, in words.
        measured: how the models' costs were measured; empty for tasks that are described by blocks.
        chunk: microseconds that a read under way may take to end.
        measures: whether networks may be measured now; otherwise they have to be known.
    """

    def __init__(self, settings: TasksSpec, folder: Path | None = None) -> None:
        self.settings = settings
        self.folder = folder if folder is not None else Path()
        self.chunk = DEFAULT_CHUNK
        self.tell: Callable[[str], None] = lambda said: None
        self.measured: dict[str, Any] = {}
        self.measures = True
        self._costed: list[CostedTask] | None = None
        self._allocation: Allocation | None = None
        self._verdict: Verdict | None = None

    @classmethod
    def load(cls, path: str | Path) -> TaskSet:
        """From ``tasks.yaml``.

        Raises:
            TaskSpecError: the file cannot be used; the message names line, field and what is allowed.
        """
        return cls(load_tasks(path), Path(path).resolve().parent)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any], folder: Path | None = None) -> TaskSet:
        """The same from a dictionary.

        Raises:
            TaskSpecError: it says something that is not allowed.
        """
        return cls(tasks_from(told), folder)

    @property
    def costed(self) -> list[CostedTask]:
        """The tasks with what they cost; models are measured when this is first asked for.

        Raises:
            NarrowboatError: a model or its weights cannot be used.
        """
        if self._costed is None:
            models = [task.name for task in self.settings.tasks if task.blocks is None]
            if models:
                from narrowboat.tasks.measure import measure_tasks

                self._costed, self.chunk, self.measured = measure_tasks(
                    self.settings, self.folder, self.tell, cached_only=not self.measures
                )
                self.settings = self._with_overhead(self.settings)
            else:
                self._costed = [described(task) for task in self.settings.tasks]
        return self._costed

    def _with_overhead(self, settings: TasksSpec) -> TasksSpec:
        """Unsaid: as measured."""
        if settings.overhead or not self.measured:
            return settings
        overhead = max(cost["overhead_us"] for cost in self.measured["costs"].values())
        return settings.model_copy(update={"overhead": overhead})

    @property
    def allocation(self) -> Allocation:
        """How the budget is shared.

        Raises:
            BudgetError: the shares that were asked for cannot hold the tasks.
        """
        if self._allocation is None:
            self._allocation = allocate(self.costed, self.settings)
        return self._allocation

    def admit(self) -> Verdict:
        """Whether every deadline that is promised holds within the budget, with reasons and what would help."""
        if self._verdict is None:
            tasks = self.allocation.tasks
            verdict = admit(tasks, self.settings, self.chunk)
            if not verdict.admitted:
                verdict = replace(verdict, suggestions=tuple(suggestions(tasks, self.settings, self.chunk)))
            self._verdict = verdict
        return self._verdict

    def require(self) -> Verdict:
        """The same, or an error with the reasons.

        Raises:
            AdmissionError: the set is refused.
        """
        verdict = self.admit()
        if not verdict.admitted:
            raise AdmissionError("the tasks are not admitted: " + "; ".join(verdict.reasons), verdict)
        return verdict

    def facts(self) -> list[TaskFacts]:
        """The tasks as policies see them."""
        levels = priorities(self.allocation.tasks)
        return [facts_of(task, k, levels[task.name]) for k, task in enumerate(self.allocation.tasks)]

    def policy(self) -> BlockBoundaries:
        """That the description asks for."""
        return BlockBoundaries(
            ORDERS[self.settings.policy],
            preempt=self.settings.preemption == "lp-keep",
            prefetch=prefetches(self.settings, self.costed),
        )

    def simulate(self, seconds: float = 10.0, costs: Costs | None = None) -> Record:
        """Run it in simulated time, every job at its worst unless ``costs`` says otherwise.

        Args:
            seconds: of simulated time in which jobs are released.
            costs: how long loads and computing take; microseconds.

        Raises:
            UsageError: no time at all.
        """
        if not seconds > 0:
            raise UsageError(f"cannot simulate {seconds} seconds")
        facts = self.facts()
        always = self.settings.budget - self.pool_bytes
        run = Simulation(
            self.policy(),
            costs or WorstCosts(),
            chunk=self.chunk,
            budget=self.pool_bytes,
            overhead=self.settings.overhead,
        )
        offsets = [task.offset for task in self.settings.tasks]
        record = run.run(periodic(facts, round(seconds * 1e6), offsets))
        record.memory = [(when, nbytes + always) for when, nbytes in record.memory]
        record.setup = self.setup(facts)
        record.about = about()
        return record

    def start(
        self,
        seconds: float | None = None,
        *,
        on_tick: Callable[[dict[str, Any]], None] = lambda picture: None,
        admitted_only: bool = True,
    ) -> LiveRun:
        """Begin to run the tasks for real, in a process of their own; they can be changed while they run.

        Args:
            seconds: for how long jobs are released; None until it is stopped.
            on_tick: called about ten times a second with a picture of now, in another thread.
            admitted_only: refuse a set that is not admitted.

        Raises:
            AdmissionError: the set is refused.
            ExecutorError: the process ended by itself.
            NarrowboatError: a model, weights or inputs cannot be used.
        """
        from narrowboat.tasks.live import LiveRun

        if seconds is not None and not seconds > 0:
            raise UsageError(f"cannot run for {seconds} seconds")
        verdict = self.require_runnable(admitted_only=admitted_only)
        if verdict.needed_bytes > self.settings.budget:
            raise AdmissionError("; ".join(verdict.reasons), verdict)
        return LiveRun(self, seconds, on_tick)

    def run(
        self,
        seconds: float | None = 60.0,
        *,
        on_tick: Callable[[dict[str, Any]], None] = lambda picture: None,
        admitted_only: bool = True,
    ) -> Record:
        """The same to its end; Ctrl-C ends it early. See :meth:`start`."""
        with self.start(seconds, on_tick=on_tick, admitted_only=admitted_only) as live:
            try:
                return live.wait()
            except KeyboardInterrupt:
                live.stop()
                return live.wait()

    def require_runnable(self, *, admitted_only: bool = True) -> Verdict:
        """The verdict on a set of models.

        Raises:
            UsageError: some tasks are no models.
            AdmissionError: the set is refused.
        """
        self.refuse_described()
        return self.require() if admitted_only else self.admit()

    def refuse_described(self) -> None:
        """Only models can be run.

        Raises:
            UsageError: some tasks are described by blocks.
        """
        described_only = [task.name for task in self.settings.tasks if task.blocks is not None]
        if described_only:
            raise UsageError(
                f"{', '.join(described_only)}: described by blocks, without a model; simulate the set, or name models"
            )

    @property
    def profiles(self) -> dict[str, Any]:
        """How each network's costs were measured, by task: passes, times of its units, and what ran beside."""
        if not self.measured:
            return {}
        digests, costs = self.measured["digests"], self.measured["costs"]
        shown = ("n", "disturbed", "condition", "real_time", "units")
        return {
            task.name: {key: costs[digests[task.name]][key] for key in shown}
            for task in self.settings.tasks
            if task.name in digests
        }

    def arrangement(self) -> dict[str, Any]:
        """What the executor is told of blocks, pins and memory."""
        facts = self.facts()
        return {
            "tasks": {
                task.name: {
                    "facts": asdict(told),
                    "ends": list(task.ends if task.ends is not None else range(1, len(task.units) + 1)),
                    "pins": sorted(task.pins),
                }
                for task, told in zip(self.allocation.tasks, facts, strict=True)
            },
            "pool_bytes": self.pool_bytes,
            "pool_least": self.admit().memory.nbytes - self.admit().memory.pinned,
            "prefetch": prefetches(self.settings, self.costed),
            "mirrors": self.about("mirrors"),
            "setup": self.setup(facts),
        }

    @property
    def pool_bytes(self) -> int:
        """Of the budget, for blocks that come and go."""
        always = always_bytes(self.costed, keep=self.settings.preemption == "lp-keep")
        return self.settings.budget - self.admit().memory.pinned - always

    def with_settings(self, settings: TasksSpec, tasks: Sequence[CostedTask] | None = None) -> TaskSet:
        """The same networks under another description; nothing is measured again.

        Args:
            settings: the description; its tasks run networks that were measured for this set, under any name.
            tasks: with their blocks and pins as they are to be; None to allocate anew.

        Raises:
            UsageError: it names a network that this set does not know.
        """
        from narrowboat.tasks.measure import costed_as_measured

        self.costed  # noqa: B018 - measures, if that has not been done
        made = TaskSet(self._with_overhead(settings), self.folder)
        made.tell, made.chunk, made.measured = self.tell, self.chunk, self.measured
        costed = [costed_as_measured(spec, made.settings, self.measured) for spec in settings.tasks]
        if tasks is not None:
            by_name = {task.name: task for task in tasks}
            costed = [replace(c, pins=by_name[c.name].pins, ends=by_name[c.name].ends) for c in costed]
            made._allocation = as_described(costed, made.settings, "as before")
        made._costed = costed
        return made

    def about(self, what: str) -> dict[str, Any]:
        """What measuring told of each model: ``signatures``, ``images``, ``mirrors``; by the name of the task."""
        from narrowboat.tasks.measure import name_measured

        told = self.measured.get(what, {})
        named = [(s.name, name_measured(s, self.measured)) for s in self.settings.tasks if s.blocks is None]
        return {name: told[measured] for name, measured in named if measured in told}

    def setup(self, facts: list[TaskFacts]) -> dict[str, Any]:
        """What a run assumes, for its record."""
        verdict = self.admit()
        by_name = {task.name: task for task in verdict.tasks}
        return {
            "policy": self.settings.policy,
            "preemption": self.settings.preemption,
            "prefetch": prefetches(self.settings, self.costed),
            "budget_bytes": self.settings.budget,
            "supply": {"share": self.settings.supply.share, "delay_us": self.settings.supply.delay},
            "overhead_us": self.settings.overhead,
            "chunk_us": self.chunk,
            "admitted": verdict.admitted,
            "tasks": [
                {
                    "name": task.name,
                    "index": task.index,
                    "priority": task.priority,
                    "guaranteed": task.guaranteed,
                    "deadline_us": task.deadline,
                    "period_us": task.period,
                    "jitter_us": arrival_of(self.settings.tasks[k]).jitter,
                    "loads_us": list(task.loads),
                    "computes_us": list(task.computes),
                    "nbytes": list(task.nbytes),
                    "activation_bytes": task.activation_bytes,
                    "bound_us": by_name[task.name].bound,
                }
                for k, task in enumerate(facts)
            ],
        }
