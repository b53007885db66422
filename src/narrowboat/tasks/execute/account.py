"""What happens in a run, as it is written down: for the record, and for whoever watches."""

from __future__ import annotations

from typing import Any

from narrowboat.tasks.execute.figures import spread
from narrowboat.tasks.execute.ground import Ground
from narrowboat.tasks.policy.action import Action, Engine, View
from narrowboat.tasks.record import Change, JobRecord, Record, Segment

_CHANGE = 1 << 16  # bytes by which memory changes before that is written down
_TOLD = 20  # overruns told in full


class Account:
    """One run's account.

    Args:
        budget: bytes over the baseline.
        ground: where the tasks run, and what they hold there.

    Attributes:
        record: jobs, segments, memory.
        overheads: microseconds between the end of what ran and the beginning of what follows.
        late_wakes: microseconds by which jobs were released late.
        overruns: segments over their budgets.
        held_bytes: over the baseline, as last seen.
    """

    def __init__(self, budget: int, ground: Ground) -> None:
        self.budget, self._ground = budget, ground
        self.record = Record()
        self.overheads: list[int] = []
        self.late_wakes: list[int] = []
        self.overruns: list[dict[str, Any]] = []
        self.held_bytes = 0
        self._resumed = 0
        self._tally: dict[str, dict[str, int]] = {}
        self._busy = {engine.value: 0 for engine in Engine}

    def released(self, told: JobRecord, now: int) -> None:
        """A job has come, and is seen ``now``."""
        self.record.jobs.append(told)
        self.late_wakes.append(now - max(told.release, self._resumed))

    def ended(self, told: JobRecord, now: int, outcome: str, cause: str = "") -> None:
        """A job has come to its end, whatever that is."""
        told.outcome, told.cause = outcome, cause
        tally = self._of(told.task)
        tally["done" if outcome == "done" else "missed"] += 1
        if outcome in ("done", "late"):
            told.finish = now
            tally["slack_us"] = min(tally.get("slack_us", told.due - now), told.due - now)

    def _of(self, task: str) -> dict[str, int]:
        return self._tally.setdefault(task, {"done": 0, "missed": 0})

    def segment(self, engine: Engine, what: str, action: Action, begin: int, end: int) -> None:
        """An engine has ended what it was at."""
        number = action.job.number if action.job is not None else -1
        self._busy[engine.value] += end - begin
        self.record.segments.append(
            Segment(engine.value, what, action.task.name, number, action.block, begin, end, action.nbytes)
        )

    def overrun(self, task: str, job: int, engine: str, block: int, took: int, budget: int) -> None:
        """A segment took longer than it was allowed."""
        told = {"task": task, "job": job, "engine": engine, "block": block}
        self.overruns.append({**told, "took_us": took, "budget_us": budget})

    def look(self, now: int) -> None:
        """Write memory down if it has changed; give the heap's holes back if it is too much."""
        held = self._ground.held()
        if held > self.budget:
            self._ground.relieve()
            held = self._ground.held()
        if abs(held - self.held_bytes) >= _CHANGE:
            self.held_bytes = held
            self.record.memory.append((now, held))

    def changed(self, begin: int, end: int, budget: int, setup: dict[str, Any], allowed: int) -> None:
        """From ``end`` on other tasks, or another budget, are in force."""
        self.record.changes.append(Change(begin, end, setup, allowed, self._ground.peak()))
        self._ground.reset_peak()
        self.budget, self._resumed = budget, end

    def picture(self, view: View, now: int) -> dict[str, Any]:
        """Now, for whoever watches."""
        tasks: dict[str, dict[str, int]] = {name: dict(told) for name, told in self._tally.items()}
        for job in view.pending:
            if job.started is not None:
                told = tasks.setdefault(job.task.name, {})
                told["held_bytes"] = sum(job.task.nbytes[job.computed : job.loaded])
        return {
            "now_us": now,
            "doing": {e.value: f"{a.task.name} block {a.block}" for e, a in view.doing.items()},
            "pending": [f"{job.task.name} #{job.number}" for job in view.pending],
            "held_bytes": self.held_bytes,
            "budget_bytes": self.budget,
            "busy": {engine: spent / max(now, 1) for engine, spent in self._busy.items()},
            "tasks": tasks,
        }

    def premises(self, **more: Any) -> dict[str, Any]:
        """What the analysis rests on, as it was seen; ``more`` is known to others."""
        return {
            **more,
            "peak_bytes": self._ground.peak(),
            "boundary_overhead_us": spread(self.overheads),
            "release_lateness_us": spread(self.late_wakes),
            "overruns": len(self.overruns),
            "first_overruns": self.overruns[:_TOLD],
        }
