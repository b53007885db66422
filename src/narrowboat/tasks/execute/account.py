"""What happens in a run, as it is written down: for the record, and for whoever watches."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import MutableSequence
from dataclasses import dataclass, field
from typing import Any

from narrowboat.tasks.execute.figures import spread
from narrowboat.tasks.execute.ground import Ground
from narrowboat.tasks.policy.action import Action, Engine
from narrowboat.tasks.record import Change, JobRecord, Record, Segment

_CHANGE = 1 << 16  # bytes by which memory changes before that is written down
_TOLD = 20  # overruns told in full
_NEWS = 192  # jobs, and segments, that are told to whoever watches between two looks
NOTHING = {"done": 0, "missed": 0, "refused": 0}


@dataclass
class News:
    """What has happened since somebody last looked; beyond a number only how many.

    Attributes:
        jobs: that ended.
        segments: of the engines.
        jobs_lost, segments_lost: that are not listed.
        late_wake: the largest microseconds by which a job was released late.
    """

    jobs: list[JobRecord] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    jobs_lost: int = 0
    segments_lost: int = 0
    late_wake: int = 0


class Account:
    """One run's account.

    Args:
        budget: bytes over the baseline.
        ground: where the tasks run, and what they hold there.
        keep: jobs, segments and the like that the record holds, the last ones; None for all.

    Attributes:
        record: jobs, segments, memory.
        overheads: microseconds between the end of what ran and the beginning of what follows.
        late_wakes: microseconds by which jobs were released late.
        first_overruns: of the segments over their budgets.
        held_bytes: over the baseline, as last seen.
        counters: of what happened: overruns, prefetches by what became of them.
        tally: by task, jobs done, missed, and refused (beyond their contract, or given up by their clients), and the
            least slack.
        busy: microseconds that each engine worked.
    """

    def __init__(self, budget: int, ground: Ground, keep: int | None = None) -> None:
        self.budget, self._ground = budget, ground
        self.record = Record()
        self.overheads: MutableSequence[int] = []
        self.late_wakes: MutableSequence[int] = []
        if keep is not None:
            self.record = Record(jobs=deque(maxlen=keep), segments=deque(maxlen=keep), memory=deque(maxlen=keep))
            self.overheads, self.late_wakes = deque(maxlen=keep), deque(maxlen=keep)
        self.first_overruns: list[dict[str, Any]] = []
        self.held_bytes = 0
        self.counters: Counter[str] = Counter()
        self.tally: dict[str, dict[str, int]] = {}
        self.busy = {engine.value: 0 for engine in Engine}
        self._resumed = 0
        self._news = News()

    def news(self) -> News:
        """Since the last time; for one who watches."""
        told, self._news = self._news, News()
        return told

    def released(self, told: JobRecord, now: int) -> None:
        """A job has come, and is seen ``now``."""
        self.record.jobs.append(told)
        late = now - max(told.release, self._resumed)
        self.late_wakes.append(late)
        self._news.late_wake = max(self._news.late_wake, late)

    def ended(self, told: JobRecord, now: int, outcome: str, cause: str = "") -> None:
        """A job has come to its end, whatever that is."""
        told.outcome, told.cause = outcome, cause
        tally = self._of(told.task)
        tally["done" if outcome == "done" else "refused" if told.declined else "missed"] += 1
        if outcome in ("done", "late"):
            told.finish = now
            tally["slack_us"] = min(tally.get("slack_us", told.due - now), told.due - now)
        if len(self._news.jobs) < _NEWS:
            self._news.jobs.append(told)
        else:
            self._news.jobs_lost += 1

    def _of(self, task: str) -> dict[str, int]:
        return self.tally.setdefault(task, dict(NOTHING))

    def segment(self, engine: Engine, what: str, action: Action, begin: int, end: int) -> None:
        """An engine has ended what it was at."""
        number = action.job.number if action.job is not None else -1
        self.busy[engine.value] += end - begin
        made = Segment(engine.value, what, action.task.name, number, action.block, begin, end, action.nbytes)
        self.record.segments.append(made)
        if len(self._news.segments) < _NEWS:
            self._news.segments.append(made)
        else:
            self._news.segments_lost += 1

    def overrun(self, task: str, job: int, engine: str, block: int, took: int, budget: int) -> None:
        """A segment took longer than it was allowed."""
        self.counters["overruns"] += 1
        if len(self.first_overruns) < _TOLD:
            told = {"task": task, "job": job, "engine": engine, "block": block}
            self.first_overruns.append({**told, "took_us": took, "budget_us": budget})

    def look(self, now: int) -> int:
        """Write memory down if it has changed; give the heap's holes back if it is too much. Bytes over the budget."""
        held = self._ground.held()
        if held > self.budget:
            self._ground.relieve()
            held = self._ground.held()
        if abs(held - self.held_bytes) >= _CHANGE:
            self.held_bytes = held
            self.record.memory.append((now, held))
        return held - self.budget

    def changed(self, begin: int, end: int, budget: int, setup: dict[str, Any], allowed: int) -> None:
        """From ``end`` on other tasks, or another budget, are in force."""
        self.record.changes.append(Change(begin, end, setup, allowed, self._ground.peak()))
        self._ground.reset_peak()
        self.budget, self._resumed = budget, end

    def premises(self, **more: Any) -> dict[str, Any]:
        """What the analysis rests on, as it was seen; ``more`` is known to others."""
        return {
            **more,
            "peak_bytes": self._ground.peak(),
            "boundary_overhead_us": spread(self.overheads),
            "release_lateness_us": spread(self.late_wakes),
            "overruns": self.counters["overruns"],
            "first_overruns": self.first_overruns,
        }

    @property
    def peak_bytes(self) -> int:
        """Over the baseline, since the last change."""
        return self._ground.peak()
