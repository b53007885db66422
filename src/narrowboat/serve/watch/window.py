"""A bounded memory of what the executor did lately, from which a trace can be written at any time."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from narrowboat.machine.about import about
from narrowboat.tasks.record import Change, JobRecord, Record, Segment

_UNTOLD = "what the run was granted was not told"
_NO_FAULTS = "pages read back from storage were not told"
_BACK = 1_000_000  # microseconds by which a record may begin sooner, to begin with nothing under way
_CHANGES = 256  # each holds a whole setup


class Window:
    """What happened in the last seconds, and of the run before if the executor was started anew.

    Args:
        seconds: kept at most.
        most: jobs, and segments, kept at most (some 250 bytes each).

    Attributes:
        lost: of this run: ``jobs`` and ``segments`` that nobody listed, and ``dropped``: kept for less than
            ``seconds`` because they were more than ``most``.
        restarts: of the executor.
    """

    def __init__(self, seconds: float = 60.0, most: int = 50_000) -> None:
        if seconds <= 0 or most < 1:
            raise ValueError("a window keeps something")
        self.seconds, self.most = seconds, most
        self.restarts = 0
        self._run = _Run(round(seconds * 1e6), most)
        self._before: _Run | None = None

    @property
    def lost(self) -> Mapping[str, int]:
        """See the class."""
        return self._run.lost

    def tick(self, event: Mapping[str, Any]) -> None:
        """Take in one tick of the feed."""
        self._run.take(event)

    def plan(
        self,
        plan: Mapping[str, Any],
        setup: Mapping[str, Any],
        *,
        begin: int | None = None,
        end: int | None = None,
        allowed: int = 0,
    ) -> None:
        """Another plan is in force.

        Args:
            plan: as ``GET /v1/plan`` tells it.
            setup: as ``TaskSet.setup`` makes it.
            begin, end: of the change, microseconds of the run; when the last tick was, if they are not known.
            allowed: microseconds that the change may take.
        """
        self._run.change(dict(setup), begin, end, allowed)

    def granted(self, real_time: Mapping[str, Any]) -> None:
        """What the executor's "started" told of its real-time class."""
        self._run.real_time = dict(real_time)

    def restarted(self) -> None:
        """Another executor process: its clock and its jobs' numbers begin anew. What was in force is until told."""
        self.restarts += 1
        self._before, setup = self._run, self._run.last_setup
        self._run = _Run(round(self.seconds * 1e6), self.most)
        self._run.setup = setup

    def record(self, seconds: float | None = None, *, before: bool = False) -> Record:
        """What happened in the last seconds, beginning at an instant in which no job was under way if there is one.

        Jobs that have not ended are in it as far as their segments tell: released when the first of those began.

        Args:
            seconds: all that is kept, if left out.
            before: of the run that ended with the last restart instead (empty if there was none).
        """
        run = self._before if before else self._run
        return run.record(self.seconds if seconds is None else seconds) if run is not None else Record()


class _Run:
    """One executor process."""

    def __init__(self, length: int, most: int) -> None:
        self._length, self._most = length, most
        self.setup: dict[str, Any] = {}
        self.real_time: dict[str, Any] = {"lost": [_UNTOLD]}
        self.lost = {"jobs": 0, "segments": 0, "dropped": 0}
        self._jobs: deque[JobRecord] = deque()
        self._segments: deque[Segment] = deque()
        self._memory: deque[tuple[int, int]] = deque()
        self._changes: deque[Change] = deque()
        self._now = self._seen = self._overruns = self._late = self._peak = 0
        self._pending: list[str] = []
        self._faults: int | None = None
        self._steps: tuple[float, int] | None = None
        self._step = 0.0

    @property
    def last_setup(self) -> dict[str, Any]:
        return self._changes[-1].setup if self._changes else self.setup

    # -- what comes in ---------------------------------------------------------------------------------

    def take(self, tick: Mapping[str, Any]) -> None:
        now = self._now = max(self._now, tick["now_us"])
        for told in tick["jobs"]:
            job = JobRecord(**told)
            job.task = sys.intern(job.task)
            self._jobs.append(job)
        for engine, what, task, *numbers in tick["segments"]:
            self._segments.append(Segment(sys.intern(engine), sys.intern(what), sys.intern(task), *numbers))
        if not self._memory or self._memory[-1][1] != tick["held_bytes"]:
            self._memory.append((now, tick["held_bytes"]))
        self.lost["jobs"] += tick.get("jobs_lost", 0)
        self.lost["segments"] += tick.get("segments_lost", 0)
        self._seen += len(tick["jobs"]) + tick.get("jobs_lost", 0)
        self._pending = tick.get("pending", [])
        self._faults = tick.get("major_faults")
        self._overruns = tick.get("counters", {}).get("overruns", 0)
        self._late = max(self._late, tick.get("late_wake_us", 0))
        self._peak = max(tick.get("peak_bytes", 0), tick["held_bytes"])
        if self._steps is None:
            self._steps = tick["time"], now
        self._step = max(self._step, abs(tick["time"] - self._steps[0] - (now - self._steps[1]) / 1e6))
        self._forget(now - self._length)

    def change(self, setup: dict[str, Any], begin: int | None, end: int | None, allowed: int) -> None:
        if not self.setup or not self._now:
            self.setup = setup
            return
        if begin is None and setup == self.last_setup:
            return  # told again
        after = self._changes[-1].end if self._changes else 0
        begin = max(self._now if begin is None else begin, after)
        end = max(self._now if end is None else end, begin)
        self._now = max(self._now, end)
        self._changes.append(Change(begin, end, setup, allowed, self._peak))
        if len(self._changes) > _CHANGES:
            self._forget(self._changes[0].end)

    def _forget(self, until: int) -> None:
        """All that ended before a time, and what is too much."""
        while self._jobs and (len(self._jobs) > self._most or _end(self._jobs[0]) < until):
            self.lost["dropped"] += _end(self._jobs.popleft()) >= until
        while self._segments and (len(self._segments) > self._most or self._segments[0].end < until):
            self.lost["dropped"] += self._segments.popleft().end >= until
        while len(self._memory) > 1 and (len(self._memory) > self._most or self._memory[1][0] < until):
            self._memory.popleft()
        while self._changes and self._changes[0].end <= until:
            self.setup = self._changes.popleft().setup

    # -- what goes out ---------------------------------------------------------------------------------

    def record(self, seconds: float) -> Record:
        begin = self._idle_before(max(self._now - round(seconds * 1e6), 0))
        setup, changes = self.setup, list(self._changes)
        while changes and changes[0].end <= begin:
            setup = changes.pop(0).setup
        known = _Known(setup, changes)
        jobs = [job for job in self._jobs if job.release >= begin and known.block(job.task, 0, job.release)]
        parts = [
            part
            for part in self._segments
            if part.begin >= begin and part.end <= self._now and known.block(part.task, part.block, part.begin)
        ]
        jobs += known.under_way(self._pending, parts)
        jobs.sort(key=lambda job: (job.release, job.task))
        there = {(job.task, job.number) for job in jobs}
        parts = [part for part in parts if part.job < 0 or (part.task, part.job) in there]
        memory = [(max(when, begin), held) for when, held in self._memory]
        memory = memory[max(bisect_right(memory, begin, key=lambda point: point[0]) - 1, 0) :]
        return Record(setup, jobs, parts, memory, self._now, self._premises(begin), changes, about())

    def _idle_before(self, cut: int) -> int:
        """The last instant up to ``cut`` in which no job was under way; some time before it, if there is none."""
        begin = cut
        for job in reversed(self._jobs):  # in the order of their ends
            if _end(job) < begin or begin <= cut - _BACK:
                break
            begin = min(begin, job.release)
        return max(begin, cut - _BACK, 0)

    def _premises(self, begin: int) -> dict[str, Any]:
        late = {"n": self._seen, "max": self._late} if self._seen else {"n": 0}
        real_time = dict(self.real_time)
        if self._faults is None:
            real_time["lost"] = [*real_time.get("lost", ()), _NO_FAULTS]
        return {
            "real_time": real_time,
            "major_faults": self._faults or 0,
            "clock_step_s": round(self._step, 3),
            "peak_bytes": self._peak,
            "release_lateness_us": late,
            "overruns": self._overruns,
            "window": {"begin_us": begin, **self.lost},
        }


class _Known:
    """Which tasks and blocks there were when."""

    def __init__(self, setup: Mapping[str, Any], changes: Iterable[Change]) -> None:
        setups = [(0, setup), *((change.begin, change.setup) for change in changes)]
        self._from = [begin for begin, _ in setups]
        self._tasks = [{task["name"]: task for task in found.get("tasks", ())} for _, found in setups]

    def task(self, name: str, when: int) -> Mapping[str, Any] | None:
        """What was assumed of it then; None if it was not there."""
        place = len(self._from) - 1
        while place and self._from[place] > when:
            place -= 1
        return self._tasks[place].get(name)

    def block(self, name: str, block: int, when: int) -> bool:
        """Whether there was one of that number."""
        task = self.task(name, when)
        return task is not None and 0 <= block < len(task["loads_us"])

    def under_way(self, names: Iterable[str], parts: Iterable[Segment]) -> list[JobRecord]:
        """Jobs that have not ended, as far as their segments tell; ``names`` as a tick has them ("task #3")."""
        wanted = set(names)
        found: dict[tuple[str, int], JobRecord] = {}
        for part in parts if wanted else ():
            key = part.task, part.job
            task = self.task(part.task, part.begin)
            if task is not None and key not in found and f"{part.task} #{part.job}" in wanted:
                found[key] = JobRecord(*key, part.begin, part.begin + task["deadline_us"], part.begin)
        return list(found.values())


def _end(job: JobRecord) -> int:
    return job.finish if job.finish is not None else job.release
