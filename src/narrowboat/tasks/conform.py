"""Does a recorded run keep every premise of the analysis? A broken one voids the guarantee, and is named."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.tasks.analysis.model import Arrival
from narrowboat.tasks.record import JobRecord, Record

_SHOWN = 3
_WORK = ("abort", "swap_out")  # nobody's, and work all the same
_BESIDE = ("prefetch", "abort", "swap_in", "swap_out")  # may go on over a boundary


@dataclass(frozen=True)
class Premise:
    """One assumption.

    Attributes:
        name: of it.
        holds: in every case that was looked at.
        checked: how many those were.
        said: the first cases in which it did not, or what was seen.
    """

    name: str
    holds: bool
    checked: int
    said: str = ""


@dataclass(frozen=True)
class Conformance:
    """The whole answer.

    Attributes:
        premises: one by one.
        missed: deadlines of guaranteed tasks.
        jobs: of guaranteed tasks that ended.
        over_bound: responses over their bounds.
        admitted: whether the set was.
    """

    premises: tuple[Premise, ...]
    missed: int
    jobs: int
    over_bound: int
    admitted: bool

    @property
    def valid(self) -> bool:
        """Whether the guarantee held: admitted, and no premise broken."""
        return self.admitted and all(premise.holds for premise in self.premises)

    @property
    def wording(self) -> str:
        """What may be said."""
        broken = [premise.name for premise in self.premises if not premise.holds]
        tail = f"{self.missed} of {self.jobs} deadlines missed, {self.over_bound} responses over their bound"
        if not self.admitted:
            return f"none was given: the set was not admitted; {tail}"
        if broken:
            return f"void: {', '.join(broken)} broken; {tail}"
        bound = (
            ""
            if self.missed or not self.jobs
            else (f"; were jobs independent, fewer than {min(3 / self.jobs, 1):.2%} would miss (95 %)")
        )
        return f"valid: no premise broken; {tail}{bound}"

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "valid": self.valid,
            "admitted": self.admitted,
            "missed": self.missed,
            "jobs": self.jobs,
            "over_bound": self.over_bound,
            "premises": [
                {"name": p.name, "holds": p.holds, "checked": p.checked, "said": p.said} for p in self.premises
            ],
            "wording": self.wording,
        }


def conform(record: Record) -> Conformance:
    """Replay a record against its own setup; where tasks changed, each stretch against what was in force."""
    parts = [_conform(stretch, something=bool(record.jobs)) for stretch in record.stretches()]
    together = [_together(premises) for premises in zip(*(part.premises for part in parts), strict=True)]
    return Conformance(
        (*together, _changes(record)),
        sum(part.missed for part in parts),
        sum(part.jobs for part in parts),
        sum(part.over_bound for part in parts),
        all(part.admitted for part in parts),
    )


def _together(premises: tuple[Premise, ...]) -> Premise:
    """One premise over all stretches of a run."""
    broken = [premise for premise in premises if not premise.holds]
    said = "; ".join(dict.fromkeys(premise.said for premise in broken or premises if premise.said))
    return Premise(premises[0].name, not broken, sum(premise.checked for premise in premises), said)


def _changes(record: Record) -> Premise:
    """Changing the tasks took no longer than the new ones could bear."""
    broken = [
        (change.allowed - (change.end - change.begin), f"{_time(change.end - change.begin)} at {_time(change.begin)}")
        for change in record.changes
        if change.end - change.begin > change.allowed
    ]
    return _premise("changes within what the tasks bear", len(record.changes), broken)


def _conform(record: Record, *, something: bool) -> Conformance:
    """A stretch of a run in which ``something`` came, if not in this stretch."""
    replay = _Replay(record)
    guaranteed = {task["name"]: task for task in record.setup["tasks"] if task["guaranteed"]}
    mine = [job for job in record.jobs if job.task in guaranteed and not job.declined]
    jobs = [job for job in mine if job.outcome != "unfinished"]
    late = [job for job in jobs if job.outcome != "done"]
    overdue = [job for job in mine if job.outcome == "unfinished" and job.due <= record.end]
    over = [job for job in jobs if replay.over_bound(job)]
    return Conformance(
        (
            replay.evidence(something=something),
            replay.segments(),
            replay.boundaries(),
            replay.priorities(),
            replay.conserving(),
            replay.arrivals(),
            replay.memory(),
            replay.supply(),
            replay.responses(over),
            replay.machine(),
        ),
        len(late) + len(overdue),
        len(jobs) + len(overdue),
        len(over),
        bool(record.setup.get("admitted")),
    )


@dataclass
class _Boundary:
    """A point at which a segment began while nothing else was under way."""

    when: int
    task: str
    job: int


class _Replay:
    def __init__(self, record: Record) -> None:
        self.record = record
        self.setup = record.setup
        self.tasks = {task["name"]: task for task in record.setup["tasks"]}
        self.jobs = {(job.task, job.number): job for job in record.jobs}
        self.parts = sorted(record.segments, key=lambda part: (part.begin, part.end))
        self.brought = sorted((part.end, part.task, part.job) for part in self.parts if part.what == "swap_in")
        # What decides take; everything else has to be as if they took none.
        self.slack = self.setup["overhead_us"]
        self.pauses = [(change.begin, change.end) for change in record.changes]

    def over_bound(self, job: JobRecord) -> bool:
        """Whether a response exceeds its bound; its deadline, while the work that a change took is made up for."""
        task = self.tasks[job.task]
        bound = task["bound_us"]
        if job.response is None or bound is None:
            return False
        if any(begin <= job.release < end for begin, end in self._made_up()):
            bound = max(bound, task["deadline_us"])
        return job.response > bound

    def _made_up(self) -> list[tuple[int, int]]:
        """The busy stretches that began with a change."""
        if not self.pauses:
            return []
        busy = _union([*self.pauses, *self._waiting()])
        return [span for span in busy if any(span[0] <= begin <= span[1] for begin, _ in self.pauses)]

    def _waiting(self) -> list[tuple[int, int]]:
        """While each job that ended was there."""
        return [
            (job.release, job.finish if job.finish is not None else job.start if job.start is not None else job.due)
            for job in self.record.jobs
            if job.outcome in ("done", "late")
        ]

    def evidence(self, *, something: bool) -> Premise:
        """Something ran, and every job that ended did so by segments that are there."""
        computed = {(p.task, p.job, p.block) for p in self.parts if p.what == "compute"}
        whole = {(p.task, p.job) for p in self.parts if p.what == "run"}
        broken = []
        for job in self.record.jobs:
            blocks = range(len(self.tasks[job.task]["computes_us"]))
            if job.outcome not in ("done", "late") or (job.task, job.number) in whole:
                continue
            if any((job.task, job.number, b) not in computed for b in blocks):
                broken.append((0, f"{_name(job)} ended without all of its blocks"))
        if not something:
            broken.append((0, "no job was released"))
        return _premise("a record of the jobs", len(self.record.jobs), broken)

    def segments(self) -> Premise:
        """Every block had its time within what it may take and what of the core was assumed to be there.

        A block that takes longer has either been given less of the core, or costs more than was measured; nobody can
        tell which. While the excess in any stretch of time is within what the supply may withhold in it, the analysis
        covers both.
        """
        broken = []
        checked = over = 0
        lost = _Lost(self.setup["supply"]["share"], self.setup["supply"]["delay_us"])
        for part in sorted(self.parts, key=lambda part: part.end):
            task = self.tasks.get(part.task)
            if task is None or part.what not in ("load", "compute", "prefetch", "swap_in", "run"):
                continue
            checked += 1
            costs = task["loads_us" if part.engine == "load" else "computes_us"]
            allowed = (sum(costs) if part.what in ("swap_in", "run") else costs[part.block]) + self.slack
            excess = part.end - part.begin - allowed
            if excess > 0:
                over += 1
                if not lost.bear(part.begin, part.end, excess):
                    took = part.end - part.begin
                    what = f"{part.what} of {part.task} block {part.block} took {_time(took)} of {_time(allowed)}"
                    broken.append((-excess, what))
        seen = f"{over} took longer, by what the core may be withheld" if over else ""
        return _premise("segments within their budgets", checked, broken, seen)

    def boundaries(self) -> Premise:
        """A job's segment begins when both engines have ended what they were at; a prefetch is nobody's."""
        broken = []
        busy_until = 0
        at = -1
        for part in self.parts:
            if part.what in _BESIDE:
                continue
            if part.begin < busy_until and part.begin > at + max(self.slack, 1):
                broken.append((0, f"{part.what} of {part.task} block {part.block} began within another's segment"))
            if part.begin >= busy_until:
                at = part.begin
            busy_until = max(busy_until, part.end)
        return _premise("decisions at boundaries only", len(self.parts), broken)

    def _key(self, job: JobRecord) -> tuple[Any, ...]:
        task = self.tasks[job.task]
        if self.setup["policy"] != "fp":
            return (not task["guaranteed"], job.due, task["index"], job.number)
        return (not task["guaranteed"], -task["priority"], job.release, task["index"], job.number)

    def _starts(self) -> Iterator[_Boundary]:
        busy_until = 0
        for part in self.parts:
            if part.what in _BESIDE or part.job < 0:
                continue
            if part.begin >= busy_until:
                yield _Boundary(part.begin, part.task, part.job)
            busy_until = max(busy_until, part.end)

    def priorities(self) -> Premise:
        """At every boundary the job that goes first by the policy was taken."""
        broken = []
        checked = 0
        open_jobs = sorted(self.record.jobs, key=lambda job: job.release)
        pending: list[JobRecord] = []
        place = 0
        for boundary in self._starts():
            while place < len(open_jobs) and open_jobs[place].release < boundary.when - self.slack:
                if open_jobs[place].outcome != "skipped" or open_jobs[place].start is not None:
                    pending.append(open_jobs[place])
                place += 1
            pending = [job for job in pending if job.finish is None or job.finish > boundary.when]
            chosen = self.jobs.get((boundary.task, boundary.job))
            if chosen is None:
                broken.append((0, f"{boundary.task} #{boundary.job} has no job"))
                continue
            checked += 1
            if self.setup["policy"] == "rt-swap" and self._brought(boundary):
                continue
            candidates = [job for job in pending if job.outcome not in ("aborted", "failed", "unfinished")]
            if self.setup["preemption"] == "np":
                begun = [j for j in candidates if j.start is not None and j.start < boundary.when]
                candidates = [j for j in begun if j is not chosen] or candidates
                if chosen.start is not None and chosen.start < boundary.when:
                    continue
            first = min(candidates, key=self._key, default=chosen)
            by_rank = not self.tasks[first.task]["guaranteed"] and any(job.rank for job in candidates)
            if self._key(first) < self._key(chosen) and not by_rank:  # those are promised nothing: clients rank them
                what = f"at {_time(boundary.when)} {_name(chosen)} went on while {_name(first)} waited"
                broken.append((first.release - boundary.when, what))
        return _premise("the right job at every boundary", checked, broken)

    def _brought(self, boundary: _Boundary) -> bool:
        """Whether the swap-in that ended last before a job's run was its own: then it goes first, whoever waits."""
        place = bisect_right(self.brought, (boundary.when, "\uffff", 0))
        return place > 0 and self.brought[place - 1][1:] == (boundary.task, boundary.job)

    def conserving(self) -> Premise:
        """The engines did not rest while a job was waiting, but for the time of a decision."""
        busy = _union([*self.pauses, *((p.begin, p.end) for p in self.parts if p.job >= 0 or p.what in _WORK)])
        waiting = _union(self._waiting())
        allowed = max(self.slack, 1) + (self.setup["chunk_us"] if self.setup.get("prefetch") else 0)
        broken = [
            (allowed - (end - begin), f"nothing ran for {_time(end - begin)} at {_time(begin)}")
            for begin, end in _minus(waiting, busy)
            if end - begin > allowed
        ]
        return _premise("no rest while a job waits", len(busy), broken)

    def arrivals(self) -> Premise:
        """No more jobs came than the contracts allow."""
        broken = []
        for name, task in self.tasks.items():
            if task.get("closed_loop"):
                continue
            curve = Arrival(task["period_us"], task["jitter_us"])
            times = sorted(job.release for job in self._let_in() if job.task == name)
            ahead = math.ceil(1 + task["jitter_us"] / task["period_us"]) + 1
            for k, first in enumerate(times):
                for n, later in enumerate(times[k + 1 : k + 1 + ahead], 2):
                    if curve.eta(later - first + 1) < n:
                        broken.append((0, f"{n} jobs of {name} came within {_time(later - first)}"))
        return _premise("arrivals within the contracts", len(self.record.jobs), broken)

    def _let_in(self) -> list[JobRecord]:
        """Those that were not refused at the door."""
        return [job for job in self.record.jobs if not job.declined]

    def memory(self) -> Premise:
        """Never more than the budget."""
        budget = self.setup["budget_bytes"]
        points = list(self.record.memory)
        peak = self.record.premises.get("peak_bytes")
        broken = [(budget - held, f"{format_bytes(held)} at {_time(when)}") for when, held in points if held > budget]
        if peak is not None and peak > budget:
            who = "the device's account" if "device" in self.record.premises else "the kernel"
            broken.append((budget - peak, f"{who} saw a peak of {format_bytes(peak)}"))
        most = max([held for _, held in points] + ([peak] if peak is not None else []), default=0)
        return _premise("memory within the budget", len(points), broken, f"{format_bytes(most)} at most")

    def supply(self) -> Premise:
        """The core was there when it was needed: seen in the times of decisions and releases."""
        told = self.record.premises.get("release_lateness_us", {"n": 0})
        if not told["n"]:
            return Premise("the core is there", True, 0, "simulated")
        allowed = self.setup["supply"]["delay_us"] + max(self.slack, 1)
        broken = [] if told["max"] <= allowed else [(0, f"a release was {_time(told['max'])} late")]
        return _premise("the core is there", told["n"], broken, f"releases at most {_time(told['max'])} late")

    def responses(self, over: list[JobRecord]) -> Premise:
        """No response is over its bound: follows from the others, and is looked at all the same."""
        broken = [(-(job.response or 0), f"{_name(job)} took {_time(job.response or 0)}") for job in over]
        return _premise("responses within their bounds", len(self.record.jobs), broken)

    def machine(self) -> Premise:
        """Real-time class, no page read back from storage, a clock that did not jump."""
        told = self.record.premises
        if not told:
            return Premise("real-time conditions", True, 0, "simulated")
        broken = [(0, said) for said in told["real_time"]["lost"]]
        if told["major_faults"]:
            broken.append((0, f"{told['major_faults']} pages were read back from storage"))
        if told["clock_step_s"] > 1.0:
            broken.append((0, f"the wall clock jumped by {told['clock_step_s']} s (releases do not follow it)"))
        return _premise("real-time conditions", 1, broken)


class _Lost:
    """Time that was lost, held against what the supply may withhold: ``delay + (1 - share) * d`` in any time ``d``."""

    def __init__(self, share: float, delay: int) -> None:
        self._rate, self._delay = 1 - share, delay
        self._sum = 0.0
        self._least: float | None = None

    def bear(self, begin: int, end: int, excess: int) -> bool:
        """Count a stretch that took ``excess`` too long, in order of the ends; False if some window lost too much."""
        start = self._sum - self._rate * begin
        self._least = start if self._least is None else min(self._least, start)
        self._sum += excess
        return self._sum - self._rate * end - self._least <= self._delay


def _premise(name: str, checked: int, broken: list[tuple[int, str]], seen: str = "") -> Premise:
    """The worst cases first."""
    if not broken:
        return Premise(name, True, checked, seen)
    shown = [said for _, said in sorted(broken, key=lambda each: each[0])[:_SHOWN]]
    more = f"; {len(broken) - len(shown)} more" if len(broken) > len(shown) else ""
    return Premise(name, False, checked, "; ".join(shown) + more)


def _union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _minus(spans: list[tuple[int, int]], others: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What of the first lies in none of the second; both in order and apart."""
    place = 0
    for begin, end in spans:
        at = begin
        while place < len(others) and others[place][1] <= at:
            place += 1
        k = place
        while k < len(others) and others[k][0] < end:
            if others[k][0] > at:
                yield at, others[k][0]
            at = max(at, others[k][1])
            k += 1
        if at < end:
            yield at, end


def _name(job: JobRecord) -> str:
    return f"{job.task} #{job.number}"


def _time(microseconds: int) -> str:
    return format_seconds(microseconds / 1e6)
