"""What Prometheus is told: every name with its unit, in a registry of the gateway's own.

Counts of the executor begin at 0 with every process; here they go on. Labels have few values: tasks of the plans that
were in force, codes of HTTP, and the sets of words below.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder

import narrowboat
from narrowboat.serve.watch.counts import GrowingCounts
from narrowboat.serve.watch.premises import GIVEN_UP, PREMISES, Premises
from narrowboat.tasks.record import BEYOND, EXPIRED

# Seconds: from 100 us to a minute, some three to a decade.
RESPONSES = (
    1e-4,
    2.5e-4,
    5e-4,
    1e-3,
    2.5e-3,
    5e-3,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
)
OVERHEADS = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7.5e-4, 1e-3, 1.5e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5)
MISSES = ("late", "expired", "not begun", "aborted", "failed", "unfinished", "not listed")
PROTOCOLS = ("oip-http", "grpc", "openai", "http")
OUTCOMES = ("done", "refused", "given up", *MISSES)
_POOLS = ("resident", "swap", "other")
_PREFETCHES = {"hit": "prefetch_hit", "aborted": "prefetch_aborted", "wasted": "prefetch_wasted"}


class Metrics:
    """The gateway's own registry.

    Args:
        premises: whose state is told with every scrape.
    """

    def __init__(self, premises: Premises) -> None:
        self.registry = registry = CollectorRegistry()
        self._premises = premises
        self._known: set[str] = set()
        self._grown, self._told = GrowingCounts(), GrowingCounts()

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"narrowboat_{name}", told, labels, registry=registry)

        def gauge(name: str, told: str, *labels: str) -> Gauge:
            return Gauge(f"narrowboat_{name}", told, labels, registry=registry)

        def histogram(name: str, told: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"narrowboat_{name}", told, labels, buckets=tuple(buckets), registry=registry)

        self._requests = counter("requests", "Requests answered, by HTTP status.", "protocol", "task", "code")
        self._counts: dict[tuple[str, str, str], Counter] = {}
        self._in_flight = gauge("requests_in_flight", "Requests to tasks that wait for their answer.")
        self._overhead = histogram(
            "gateway_overhead_seconds",
            "Of requests that were one job: time in the gateway beside the response.",
            OVERHEADS,
        )
        self._responses = histogram(
            "response_seconds", "From release to finish of every job that ended.", RESPONSES, "task"
        )
        self._bound = gauge("response_bound_seconds", "Bound on the response, by the analysis.", "task")
        self._deadline = gauge("deadline_seconds", "Relative deadline.", "task")
        self._jobs = counter("jobs", "Jobs that ended, by what became of them.", "task", "outcome")
        self._misses = counter("deadline_misses", "Jobs that were let in and missed.", "task", "cause")
        self._overruns = counter("budget_overruns", "Segments over their budgets.")
        self._memory = gauge("memory_bytes", "Memory held over the baseline.", "pool")
        self._limit = gauge("memory_limit_bytes", "The budget.")
        self._peak = gauge("memory_peak_bytes", "High-water mark over the baseline, of this budget.")
        self._busy = counter("engine_busy_seconds", "Time in which an engine worked.", "engine")
        self._prefetches = counter("prefetches", "Blocks loaded ahead, by what became of them.", "result")
        self._found = counter("blocks_found", "Blocks that were still in memory and not read again.")
        self._late = gauge("release_lateness_seconds", "Largest lateness of a release since the last tick.")
        self._lost = counter("events_lost", "Jobs and segments that were not listed one by one.", "what")
        self._restarts = counter("executor_restarts", "Executors that had to be started anew.")
        self._serving = gauge("serving", "1 while requests are let in.")
        self._valid = gauge("guarantee_valid", "1 while no premise of the guarantee is broken.")
        self._broken = gauge("premise_broken", "1 while it is broken, or was in the last minute.", "premise")
        self._breaches = counter("premise_breaches", "How often it was.", "premise")
        Info("narrowboat_build", "What is running.", registry=registry).info(
            {"version": narrowboat.__version__, "python": platform.python_version()}
        )
        for pool in _POOLS:
            self._memory.labels(pool)
        for engine in ("compute", "load"):
            self._busy.labels(engine)
        for result in _PREFETCHES:
            self._prefetches.labels(result)

    # -- of requests -----------------------------------------------------------------------------------

    def begun(self) -> None:
        """A request to a task waits for its answer."""
        self._in_flight.inc()

    def ended(self) -> None:
        """It waits no longer."""
        self._in_flight.dec()

    def answered(self, protocol: str, task: str, code: int, overhead: float | None) -> None:
        """A request has had its answer.

        Args:
            protocol: one of ``PROTOCOLS``; others count as "http".
            task: "" for none; one that is not known counts as that.
            code: of HTTP.
            overhead: seconds beside the executor's response; None where that cannot be told.
        """
        task = task if task in self._known else ""
        key = protocol if protocol in PROTOCOLS else "http", task, str(code)
        if (count := self._counts.get(key)) is None:  # looking for labels takes longer than counting
            count = self._counts[key] = self._requests.labels(*key)
        count.inc()
        if overhead is not None:
            self._overhead.observe(overhead)

    # -- of the executor -------------------------------------------------------------------------------

    def state(self, state: str) -> None:
        """Of the gateway."""
        self._serving.set(state == "serving")

    def plan(self, plan: Mapping[str, Any]) -> None:
        """Another plan is in force; what it does not have has no bound any more."""
        tasks = {task["name"]: task for task in plan["tasks"]}
        self._bound.clear()
        self._deadline.clear()
        for name, task in tasks.items():
            if name not in self._known:
                for cause in MISSES:
                    self._misses.labels(name, cause)
                self._responses.labels(name)
            if task["response_bound_us"] is not None:
                self._bound.labels(name).set(task["response_bound_us"] / 1e6)
            self._deadline.labels(name).set(task["deadline_us"] / 1e6)
        self._known.update(tasks)
        self._limit.set(plan["budget_bytes"])

    def restarted(self) -> None:
        """The executor's own counts begin anew."""
        self._restarts.inc()
        self._grown.restarted()

    def tick(self, event: Mapping[str, Any]) -> None:
        """Take in one tick of the feed."""
        pools = event.get("pools", {})
        for pool in _POOLS:
            self._memory.labels(pool).set(pools.get(pool, 0))
        self._limit.set(event["budget_bytes"])
        self._peak.set(event.get("peak_bytes", event["held_bytes"]))
        self._late.set(event.get("late_wake_us", 0) / 1e6)
        grown = self._grown
        for engine, spent in event.get("busy_us", {}).items():
            if engine in ("compute", "load"):
                self._busy.labels(engine).inc(grown.by(("busy", engine), spent) / 1e6)
        counters = event.get("counters", {})
        for result, key in _PREFETCHES.items():
            self._prefetches.labels(result).inc(grown.by(("counter", key), counters.get(key, 0)))
        self._overruns.inc(grown.by(("counter", "overruns"), counters.get("overruns", 0)))
        self._found.inc(grown.by(("counter", "blocks_found"), counters.get("blocks_found", 0)))
        for what in ("jobs", "segments"):
            self._lost.labels(what).inc(event.get(f"{what}_lost", 0))
        self._count_jobs(event)

    def _count_jobs(self, event: Mapping[str, Any]) -> None:
        listed: dict[str, list[int]] = {}
        for job in event["jobs"]:
            name = job["task"]
            if name not in self._known:
                continue
            outcome = outcome_of(job)
            tally = listed.setdefault(name, [0, 0])
            tally[job["outcome"] != "done"] += 1
            self._jobs.labels(name, outcome).inc()
            if outcome in MISSES:
                self._misses.labels(name, outcome).inc()
            if job["finish"] is not None:
                self._responses.labels(name).observe((job["finish"] - job["release"]) / 1e6)
        for name, told in event.get("tasks", {}).items():
            done, missed = (self._grown.by((key, name), told.get(key, 0)) for key in ("done", "missed"))
            if name not in self._known or not event.get("jobs_lost"):
                continue
            seen = listed.get(name, [0, 0])
            self._jobs.labels(name, "done").inc(max(done - seen[0], 0))
            # Refusals are among them: what was not listed cannot be told apart, and counts as the worse.
            self._jobs.labels(name, "not listed").inc(max(missed - seen[1], 0))
            self._misses.labels(name, "not listed").inc(max(missed - seen[1], 0))

    # -- what goes out ---------------------------------------------------------------------------------

    def text(self, accept: str = "") -> tuple[bytes, str]:
        """Everything, as the scraper's ``Accept`` wants it: Prometheus' text format, or OpenMetrics.

        Returns:
            The text and its content type.
        """
        self._valid.set(self._premises.valid)
        for name in PREMISES:
            self._broken.labels(name).set(self._premises.is_broken(name))
            self._breaches.labels(name).inc(self._told.by(name, self._premises.breaches(name)))
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def outcome_of(job: Mapping[str, Any]) -> str:
    """What became of a job, as one of ``OUTCOMES``."""
    outcome, cause = str(job["outcome"]), str(job["cause"])
    if outcome == "done":
        return "done"
    if cause.startswith(BEYOND):
        return "refused"
    if cause.startswith(GIVEN_UP):
        return "given up"
    if outcome == "skipped":
        return "expired" if cause == EXPIRED else "not begun"
    return outcome if outcome in MISSES else "failed"
