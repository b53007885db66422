"""What happened: every job with its segments, every change of memory. Simulator and run-time write the same record."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableSequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from narrowboat.errors import StorageError, TraceFormatError
from narrowboat.machine.cache import write_durably
from narrowboat.tasks.record_check import problem, problem_of_changes

FORMAT = "narrowboat tasks trace 2"
_NEVER = 1 << 62
BEYOND = "beyond its contract"  # begins the cause of jobs that were not let in
EXPIRED = "its deadline had passed before it began"
UNWANTED = "its client had no more use for it"
WITHDRAWN = "its client has gone"


def beyond(wait: int) -> str:
    """The cause; ``wait`` microseconds until the next may come."""
    return f"{BEYOND}: the next may come in {wait / 1e6:.6g} s"


@dataclass(slots=True)
class Segment:
    """One thing that an engine did.

    Attributes:
        engine: "load" or "compute".
        what: as in ``policy.action.Do``.
        task: for which task.
        job: number of the job; -1 for none.
        block: which.
        begin: time.
        end: time.
        nbytes: that were moved, where bytes say more than a block.
    """

    engine: str
    what: str
    task: str
    job: int
    block: int
    begin: int
    end: int
    nbytes: int = 0


@dataclass(slots=True)
class JobRecord:
    """One job from its release to its end.

    Attributes:
        task: its name.
        number: within the task, from 0.
        release: when it arrived.
        due: its absolute deadline.
        start: when its first segment began; None if it never did.
        finish: when it ended; None if it never did.
        preemptions: times another job went in between.
        outcome: "done", "late", "skipped", "aborted", "failed" or "unfinished".
        cause: why it is not "done"; empty otherwise.
        rank: among jobs that are promised nothing, smaller goes first.
        wait: where it came beyond its contract, microseconds until the next may come.
    """

    task: str
    number: int
    release: int
    due: int
    start: int | None = None
    finish: int | None = None
    preemptions: int = 0
    outcome: str = "unfinished"
    cause: str = ""
    rank: int = 0
    wait: int = 0

    @property
    def response(self) -> int | None:
        """From release to finish."""
        return None if self.finish is None else self.finish - self.release

    @property
    def declined(self) -> bool:
        """It came beyond its contract, or its client gave it up: no promise was broken."""
        return self.cause.startswith(BEYOND) or self.cause in (UNWANTED, WITHDRAWN)


@dataclass
class Change:
    """Other tasks, or another budget, from here on.

    Attributes:
        begin: when the change began; nothing was under way.
        end: when the new tasks could go on.
        setup: what was assumed from then on.
        allowed: microseconds of extra work that the new tasks can bear, and the change may take.
        peak_bytes: the kernel's high-water mark before it, over the baseline.
    """

    begin: int
    end: int
    setup: dict[str, Any]
    allowed: int
    peak_bytes: int


@dataclass
class Record:
    """A whole run. Times in microseconds from its start (the simulator's: whatever unit it was given).

    Attributes:
        setup: what was assumed: tasks with their worst cases and bounds, policy, budget, supply.
        jobs: in the order of release.
        segments: in the order of their ends.
        memory: ``(time, bytes)`` at every change.
        end: when the run ended.
        premises: what the run-time measured beside: page faults, supply gaps, real-time class.
        changes: of the tasks or the budget, in order.
        about: by which command it was made, on which machine, when (``machine.about``).
    """

    setup: dict[str, Any] = field(default_factory=dict)
    jobs: MutableSequence[JobRecord] = field(default_factory=list)
    segments: MutableSequence[Segment] = field(default_factory=list)
    memory: MutableSequence[tuple[int, int]] = field(default_factory=list)
    end: int = 0
    premises: dict[str, Any] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def stretches(self) -> list[Record]:
        """The run from change to change, each with what was assumed in it; no job reaches over a change."""
        if not self.changes:
            return [self]
        starts = [0, *(change.begin for change in self.changes)]
        ends = [*(change.begin for change in self.changes), _NEVER]
        setups = self._setups
        peaks = [*(change.peak_bytes for change in self.changes), self.premises.get("peak_bytes")]
        found = []
        for k, (begin, end) in enumerate(zip(starts, ends, strict=True)):
            premises = self.premises if peaks[k] is None else {**self.premises, "peak_bytes": peaks[k]}
            found.append(
                Record(
                    setups[k],
                    [job for job in self.jobs if begin <= job.release < end],
                    [part for part in self.segments if begin <= part.begin < end],
                    [point for point in self.memory if begin <= point[0] < end],
                    min(end, self.end),
                    premises,
                    self.changes[k - 1 : k] if k else [],
                )
            )
        return found

    @property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """What was assumed of each task, as it was last."""
        return {task["name"]: task for setup in self._setups for task in setup["tasks"]}

    @property
    def _setups(self) -> list[dict[str, Any]]:
        return [self.setup, *(change.setup for change in self.changes)]

    def responses(self) -> dict[str, list[int]]:
        """Of all jobs that ended, by task."""
        found: dict[str, list[int]] = {}
        for job in self.jobs:
            if job.response is not None:
                found.setdefault(job.task, []).append(job.response)
        return found

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "format": FORMAT,
            "setup": self.setup,
            "end_us": self.end,
            "premises": self.premises,
            "about": self.about,
            "jobs": [asdict(job) for job in self.jobs],
            "segments": [list(asdict(segment).values()) for segment in self.segments],
            "memory": [list(point) for point in self.memory],
            "changes": [asdict(change) for change in self.changes],
            "traceEvents": _chrome(self),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any], where: str = "trace") -> Record:
        """Read back what :meth:`as_json` made.

        Raises:
            TraceFormatError: it is something else.
        """
        if not isinstance(told, Mapping) or told.get("format") != FORMAT:
            raise TraceFormatError(f"{where} is no trace of tasks: it does not say format {FORMAT!r}")
        try:
            found = cls(
                dict(told["setup"]),
                [JobRecord(**job) for job in told["jobs"]],
                [Segment(*segment) for segment in told["segments"]],
                [(when, nbytes) for when, nbytes in told["memory"]],
                told["end_us"],
                dict(told["premises"]),
                [Change(**change) for change in told["changes"]],
                dict(told.get("about", {})),
            )
            wrong = problem_of_changes(found.changes, found.end)
            for part in found.stretches() if not wrong else ():
                wrong = wrong or problem(part.setup, part.jobs, part.segments, part.memory, found.end)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TraceFormatError(f"{where} is no whole trace of tasks: {error!r}") from error
        if wrong:
            raise TraceFormatError(f"{where} is no trace of one run: {wrong}")
        return found

    def save(self, path: str | Path) -> None:
        """Write a file that :meth:`load` and ui.perfetto.dev read.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            write_durably(Path(path), json.dumps(self.as_json()))
        except OSError as error:
            raise StorageError(f"cannot write the trace {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a file.

        Raises:
            TraceFormatError: it cannot be read, or is something else.
        """
        try:
            told = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise TraceFormatError(f"cannot read the trace {path}: {error.strerror}") from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise TraceFormatError(f"{path} is no JSON: {error}") from error
        return cls.from_json(told, str(path))


def _chrome(record: Record) -> list[dict[str, Any]]:
    """The same for ui.perfetto.dev: engines as threads, memory as a counter, misses as instants."""
    threads = {"compute": 1, "load": 2}
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for name, tid in threads.items()
    ]
    for part in record.segments:
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": threads[part.engine],
                "ts": part.begin,
                "dur": part.end - part.begin,
                "name": f"{part.task} #{part.job} block {part.block}" if part.job >= 0 else f"{part.task} {part.what}",
                "cat": part.what,
            }
        )
    for when, nbytes in record.memory:
        events.append({"ph": "C", "pid": 1, "ts": when, "name": "memory", "args": {"bytes": nbytes}})
    for change in record.changes:
        events.append(
            {"ph": "X", "pid": 1, "tid": 2, "ts": change.begin, "dur": change.end - change.begin, "name": "change"}
        )
    for job in record.jobs:
        if job.outcome not in ("done", "unfinished"):
            when = job.finish if job.finish is not None else job.due
            events.append(
                {"ph": "i", "s": "p", "pid": 1, "ts": when, "name": f"{job.task} #{job.number} {job.outcome}"}
            )
    return events
