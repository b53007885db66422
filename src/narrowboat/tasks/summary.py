"""A run in figures: by task, and of the engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from narrowboat.tasks.record import JobRecord, Record


@dataclass(frozen=True)
class TaskSummary:
    """One task's jobs. Times in microseconds.

    Attributes:
        name: of the task.
        guaranteed: whether its deadlines are promised.
        jobs: released.
        done: in time.
        late: ended after their deadline, or were ended for it.
        unfinished: still under way when the run ended, with their deadline to come.
        causes: of those that are not done, counted.
        median: response.
        worst: response.
        bound: by the analysis.
        deadline: relative.
        preemptions: of all jobs.
    """

    name: str
    guaranteed: bool
    jobs: int
    done: int
    late: int
    unfinished: int
    causes: dict[str, int]
    median: int | None
    worst: int | None
    bound: int | None
    deadline: int
    preemptions: int


@dataclass(frozen=True)
class Summary:
    """A whole run.

    Attributes:
        tasks: one by one.
        missed: deadlines of guaranteed tasks.
        compute_share: of the time, that the compute engine worked.
        load_share: the same of the load engine.
        peak_bytes: by the record's own count.
        budget_bytes: there were.
        seconds: it took.
    """

    tasks: tuple[TaskSummary, ...]
    missed: int
    compute_share: float
    load_share: float
    peak_bytes: int
    budget_bytes: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "tasks": [
                {
                    **{k: v for k, v in asdict(task).items() if k not in ("median", "worst", "bound", "deadline")},
                    "median_response_us": task.median,
                    "worst_response_us": task.worst,
                    "response_bound_us": task.bound,
                    "deadline_us": task.deadline,
                }
                for task in self.tasks
            ],
            "missed": self.missed,
            "compute_share": round(self.compute_share, 4),
            "load_share": round(self.load_share, 4),
            "memory": {"peak_bytes": self.peak_bytes, "budget_bytes": self.budget_bytes},
            "seconds": self.seconds,
        }


def summarise(record: Record) -> Summary:
    """The figures of a record; of tasks that changed on the way, with what was assumed last."""
    stretches = record.stretches()
    tasks = tuple(_of_task(record, facts) for facts in record.tasks.values())
    busy = {"compute": 0, "load": 0}
    for segment in record.segments:
        busy[segment.engine] += segment.end - segment.begin
    length = max(record.end, 1)
    return Summary(
        tasks,
        sum(_missed(stretch) for stretch in stretches),
        busy["compute"] / length,
        busy["load"] / length,
        max((nbytes for _, nbytes in record.memory), default=0),
        max(stretch.setup["budget_bytes"] for stretch in stretches),
        record.end / 1e6,
    )


def _of_task(record: Record, facts: dict[str, Any]) -> TaskSummary:
    jobs = [job for job in record.jobs if job.task == facts["name"]]
    times = [job.response for job in jobs if job.response is not None]
    causes: dict[str, int] = {}
    for job in jobs:
        if job.cause:
            causes[job.cause] = causes.get(job.cause, 0) + 1
    overdue, still = _unfinished(jobs, record.end)
    return TaskSummary(
        facts["name"],
        facts["guaranteed"],
        len(jobs),
        sum(job.outcome == "done" for job in jobs),
        sum(job.outcome not in ("done", "unfinished") for job in jobs) + overdue,
        still,
        causes,
        round(median(times)) if times else None,
        max(times, default=None),
        facts["bound_us"],
        facts["deadline_us"],
        sum(job.preemptions for job in jobs),
    )


def _missed(stretch: Record) -> int:
    """Deadlines of tasks that were promised theirs in this stretch, of jobs that were let in."""
    promised = {task["name"] for task in stretch.setup["tasks"] if task["guaranteed"]}
    jobs = [job for job in stretch.jobs if job.task in promised and not job.declined]
    return sum(job.outcome not in ("done", "unfinished") for job in jobs) + _unfinished(jobs, stretch.end)[0]


def _unfinished(jobs: Sequence[JobRecord], end: int) -> tuple[int, int]:
    """How many jobs that did not end are overdue, and how many are not."""
    open_jobs = [job for job in jobs if job.outcome == "unfinished"]
    overdue = sum(job.due <= end for job in open_jobs)
    return overdue, len(open_jobs) - overdue
