"""Does the promise stand? Every tick is held against what the analysis assumed; what is broken is named.

This is what can be judged while it goes on, in a few microseconds per job. The whole judgement, order of jobs and
engines' rests too, is ``narrowboat tasks conform`` on the trace that ``GET /v1/trace`` gives.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from narrowboat.quantities import format_bytes, format_seconds
from narrowboat.serve.watch.withheld import Withheld
from narrowboat.tasks.record import BEYOND, EXPIRED, UNWANTED, WITHDRAWN

# Every premise that is watched, and what it says. These are the only values of the metrics' label.
PREMISES = {
    "admission": "the set is admitted",
    "deadlines": "guaranteed jobs that were let in end by their deadlines",
    "bounds": "responses are within their bounds",
    "segments": "segments are within their budgets, or over them by no more than the core may be withheld",
    "memory": "memory stays within the budget",
    "releases": "jobs are released on time: the core is there",
    "executor": "the executor goes on",
    "real-time": "the executor has its real-time class, and its pages are not read back from storage",
}
GIVEN_UP = (UNWANTED, WITHDRAWN)  # causes of jobs that ended because their clients wanted them no more
_CHECKED = ("load", "compute", "prefetch", "swap_in", "run")


class Premises:
    """The watch over the promise; times are Unix seconds.

    Args:
        window: seconds without a breach after which a promise is valid again.
        clock: of Unix seconds.
    """

    def __init__(self, window: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        self.window = window
        self._clock = clock
        self._breaches = {name: _Breaches(window) for name in PREMISES}
        self._standing: dict[str, tuple[str, float]] = {"admission": ("no plan is in force yet", clock())}
        self._tasks: dict[str, Mapping[str, Any]] = {}
        self._slack = self._delay = 0
        self._share = 1.0
        self._withheld = Withheld(self._share, self._delay)
        self._overruns = self._faults = 0
        self.jobs = self.missed = 0

    # -- what comes in ---------------------------------------------------------------------------------

    def plan(self, plan: Mapping[str, Any], setup: Mapping[str, Any]) -> None:
        """What is assumed from now on: ``setup`` as ``TaskSet.setup`` makes it."""
        self._stands("admission", "" if plan.get("admitted") else "; ".join(plan.get("reasons") or ["not admitted"]))
        self._tasks = {task["name"]: task for task in setup["tasks"]}
        supply = setup["supply"]
        self._slack = setup["overhead_us"]
        self._delay = supply["delay_us"]
        self._share = float(supply["share"])
        self._withheld = Withheld(self._share, self._delay)

    def granted(self, real_time: Mapping[str, Any]) -> None:
        """What the executor's "started" told of its real-time class."""
        self._stands("real-time", "; ".join(real_time.get("lost", ())))

    def restarted(self) -> None:
        """The executor was lost; jobs that were under way with it."""
        self._breach("executor", "the executor was started anew")
        self._overruns = self._faults = 0
        self._withheld = Withheld(self._share, self._delay)

    def state(self, state: str, said: str = "") -> None:
        """Of the gateway: nothing is promised while it does not serve."""
        down = "" if state == "serving" else f"{state}: {said}" if said else state
        self._stands("executor", down, count=0)  # starting and draining break nothing; a restart is told as one

    def tick(self, event: Mapping[str, Any]) -> None:
        """Hold one tick of the feed against what is assumed."""
        for job in event["jobs"]:
            self._job(job, event["now_us"])
        self._segments(event)
        budget, most = event["budget_bytes"], max(event["held_bytes"], event.get("peak_bytes", 0))
        if most > budget:
            self._breach("memory", f"{format_bytes(most)} of {format_bytes(budget)}")
        late = event.get("late_wake_us", 0)
        if late > self._delay + max(self._slack, 1):
            self._breach("releases", f"a release was {_time(late)} late")
        faults = event.get("major_faults", 0) - self._faults
        if faults > 0:
            self._faults += faults
            self._breach("real-time", f"{faults} pages were read back from storage", faults)

    def _job(self, job: Mapping[str, Any], now: int) -> None:
        task = self._tasks.get(job["task"])
        if task is None or not task["guaranteed"] or job["cause"].startswith((BEYOND, *GIVEN_UP)):
            return
        self.jobs += 1
        name, finish = f"{job['task']} #{job['number']}", job["finish"]
        promised = job["release"] + task["deadline_us"]
        if job["outcome"] != "done" and not _only_the_clients(job, promised, now):
            self.missed += 1
            self._breach("deadlines", f"{name} {job['outcome']}: {job['cause']}" if job["cause"] else name)
        if finish is not None and task["bound_us"] is not None and finish - job["release"] > task["bound_us"]:
            took = _time(finish - job["release"])
            self._breach("bounds", f"{name} took {took} of {_time(task['bound_us'])}")

    def _segments(self, event: Mapping[str, Any]) -> None:
        over = 0
        for engine, what, name, _, block, begin, end, *_rest in event["segments"]:
            task = self._tasks.get(name)
            if task is None or what not in _CHECKED:
                continue
            costs = task["loads_us" if engine == "load" else "computes_us"]
            if block >= len(costs):
                continue  # of a plan that is no longer in force
            allowed = sum(costs) if what in ("swap_in", "run") else costs[block]
            took = end - begin
            over += took > allowed
            excess = took - allowed - self._slack
            if excess > 0 and not self._withheld.bear(begin, end, excess):
                self._breach("segments", f"{what} of {name} block {block} took {_time(took)} of {_time(allowed)}")
        counted = event.get("counters", {}).get("overruns", 0)
        unseen, self._overruns = counted - self._overruns - over, counted
        if event.get("segments_lost", 0) and unseen > 0:
            self._breach("segments", f"{unseen} over their budgets were not listed, and cannot be judged", unseen)

    def _breach(self, premise: str, said: str, count: int = 1) -> None:
        self._breaches[premise].add(self._clock(), said, count)

    def _stands(self, premise: str, said: str, count: int = 1) -> None:
        """A condition that lasts until it is told otherwise; empty: it holds."""
        before, since = self._standing.pop(premise, ("", self._clock()))
        if said:
            self._standing[premise] = said, since
        if said and said != before and count:
            self._breach(premise, said, count)

    # -- what goes out ---------------------------------------------------------------------------------

    @property
    def valid(self) -> bool:
        """No premise is broken now, nor was one in the last ``window`` seconds."""
        return not any(self.is_broken(name) for name in PREMISES)

    def is_broken(self, premise: str) -> bool:
        """Whether it is now, or was in the last ``window`` seconds."""
        return premise in self._standing or self._breaches[premise].lately(self._clock()) > 0

    def breaches(self, premise: str) -> int:
        """How often it was broken since the start."""
        return self._breaches[premise].count

    @property
    def broken(self) -> list[dict[str, Any]]:
        """The premises that are, as ``{"premise", "means", "said", "since", "last", "count"}``: in the window."""
        now = self._clock()
        return self._told((name, self._breaches[name].lately(now)) for name in PREMISES if self.is_broken(name))

    def as_json(self) -> dict[str, Any]:
        """For ``GET /v1/guarantee``."""
        ever = [(name, found.count) for name, found in self._breaches.items() if found.count]
        return {
            "valid": self.valid,
            "valid_since_start": not ever,
            "window_seconds": self.window,
            "broken": self.broken,
            "broken_since_start": self._told(ever),
            "premises": PREMISES,
            "jobs": self.jobs,
            "missed": self.missed,
        }

    def _told(self, counted: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
        found = []
        for name, count in counted:
            seen = self._breaches[name]
            said, since = self._standing.get(name, (seen.said, seen.since))
            told = {"said": said, "since": since, "last": seen.last, "count": count}
            found.append({"premise": name, "means": PREMISES[name], **told})
        return found


class _Breaches:
    """How often a premise was broken: since the start, and second by second in the window."""

    def __init__(self, window: float) -> None:
        self._window = window
        self._seconds: deque[list[float]] = deque()  # [when, how many]
        self.count = 0
        self.said = ""
        self.since: float | None = None
        self.last: float | None = None

    def add(self, now: float, said: str, count: int) -> None:
        if not self.lately(now):
            self.since = now
        self.count, self.said, self.last = self.count + count, said, now
        if self._seconds and now - self._seconds[-1][0] < 1:
            self._seconds[-1][1] += count
        else:
            self._seconds.append([now, count])

    def lately(self, now: float) -> int:
        while self._seconds and self._seconds[0][0] <= now - self._window:
            self._seconds.popleft()
        return round(sum(count for _, count in self._seconds))


def _only_the_clients(job: Mapping[str, Any], promised: int, now: int) -> bool:
    """Whether a job, known to have ended by ``now``, missed only the sooner deadline that its client had set."""
    if job["cause"] == EXPIRED and now < promised:
        return True
    if job["due"] >= promised or job["outcome"] not in ("late", "skipped", "aborted"):
        return False
    return job["finish"] is None or job["finish"] <= promised


def _time(microseconds: int) -> str:
    return format_seconds(microseconds / 1e6)
