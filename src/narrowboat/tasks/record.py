"""What happened: every job with its segments, every change of memory. Simulator and run-time write the same record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from narrowboat.errors import StorageError, TraceFormatError
from narrowboat.machine.cache import write_durably
from narrowboat.tasks.record_check import problem

FORMAT = "narrowboat tasks trace 1"


@dataclass
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


@dataclass
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

    @property
    def response(self) -> int | None:
        """From release to finish."""
        return None if self.finish is None else self.finish - self.release


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
    """

    setup: dict[str, Any] = field(default_factory=dict)
    jobs: list[JobRecord] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    end: int = 0
    premises: dict[str, Any] = field(default_factory=dict)

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
            "jobs": [asdict(job) for job in self.jobs],
            "segments": [list(asdict(segment).values()) for segment in self.segments],
            "memory": [list(point) for point in self.memory],
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
            )
            wrong = problem(found.setup, found.jobs, found.segments, found.memory, found.end)
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
    for job in record.jobs:
        if job.outcome not in ("done", "unfinished"):
            when = job.finish if job.finish is not None else job.due
            events.append(
                {"ph": "i", "s": "p", "pid": 1, "ts": when, "name": f"{job.task} #{job.number} {job.outcome}"}
            )
    return events
