"""Names with units, counts that only grow, labels that stay few."""

from __future__ import annotations

import time

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from narrowboat.serve.watch.metrics import MISSES, Metrics
from narrowboat.serve.watch.premises import Premises
from narrowboat.tasks.record import EXPIRED, WITHDRAWN
from serve_watch_kit import BUDGET, MIB, job, plan, setup, tick


def made(*names: str) -> Metrics:
    told = setup(*names)
    premises = Premises()
    premises.plan(plan(told), told)
    metrics = Metrics(premises)
    metrics.plan(plan(told))
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    found: float | None = metrics.registry.get_sample_value(f"narrowboat_{name}", labels)
    return found


def test_a_tick_is_told() -> None:
    metrics = made("a", "b")
    metrics.tick(
        tick(
            2_000_000,
            [job("a", 0, 1_000), job("a", 1, 21_000, 3_000)],
            counters={
                "overruns": 2,
                "prefetch_hit": 5,
                "prefetch_aborted": 1,
                "prefetch_wasted": 0,
                "blocks_found": 4,
            },
        )
    )
    assert value(metrics, "memory_bytes", pool="resident") == 12 * MIB
    assert value(metrics, "memory_limit_bytes") == BUDGET
    assert value(metrics, "memory_peak_bytes") == 30 * MIB
    assert value(metrics, "engine_busy_seconds_total", engine="compute") == 1.0
    assert value(metrics, "prefetches_total", result="hit") == 5
    assert value(metrics, "budget_overruns_total") == 2
    assert value(metrics, "response_bound_seconds", task="a") == 0.01
    assert value(metrics, "deadline_seconds", task="a") == 0.02
    assert value(metrics, "response_seconds_count", task="a") == 2
    assert value(metrics, "response_seconds_bucket", task="a", le="0.005") == 2
    assert value(metrics, "response_seconds_bucket", task="a", le="0.0025") == 0
    assert value(metrics, "response_seconds_bucket", task="a", le="60.0") == 2
    assert value(metrics, "jobs_total", task="a", outcome="done") == 2
    assert [value(metrics, "deadline_misses_total", task="a", cause=cause) for cause in MISSES] == [0] * len(MISSES)


def test_misses_have_one_of_a_few_causes_and_refusals_are_none() -> None:
    metrics = made("a")
    ends = [
        job("a", 0, 0, 30_000, outcome="late", cause="over its deadline"),
        job("a", 1, 0, None, outcome="skipped", cause=EXPIRED),
        job("a", 2, 0, None, outcome="skipped", cause="the job before is still under way"),
        job("a", 3, 0, None, outcome="skipped", cause="beyond its contract: the next may come in 1 s"),
        job("a", 4, 0, None, outcome="aborted", cause="over its budget"),
        job("a", 5, 0, None, outcome="failed", cause="ValueError: 17 of 19"),
        job("a", 6, 0, None, outcome="aborted", cause=WITHDRAWN),
        job("a", 7, 0, None, outcome="something new", cause="?"),
    ]
    metrics.tick(tick(100_000, ends))
    seen = {cause: value(metrics, "deadline_misses_total", task="a", cause=cause) for cause in MISSES}
    one = dict.fromkeys(("late", "expired", "not begun", "aborted"), 1)
    assert seen == {**dict.fromkeys(MISSES, 0), **one, "failed": 2}
    assert value(metrics, "jobs_total", task="a", outcome="refused") == 1
    assert value(metrics, "jobs_total", task="a", outcome="given up") == 1


def test_jobs_that_are_not_listed_are_counted_from_the_tallies() -> None:
    metrics = made("a")
    metrics.tick(tick(100_000, [job("a", 0, 1_000)], tasks={"a": {"done": 1, "missed": 0}}))
    tallies = {"a": {"done": 11, "missed": 3}}
    metrics.tick(tick(200_000, [job("a", 1, 101_000)], tasks=tallies, jobs_lost=12))
    assert value(metrics, "jobs_total", task="a", outcome="done") == 11
    assert value(metrics, "deadline_misses_total", task="a", cause="not listed") == 3
    assert value(metrics, "events_lost_total", what="jobs") == 12


def test_counts_go_on_over_a_restart() -> None:
    metrics = made("a")
    metrics.tick(tick(4_000_000, counters={"overruns": 7, "prefetch_hit": 5}))
    metrics.restarted()
    metrics.tick(tick(4_400_000, counters={"overruns": 8}))  # it has already gone past where the one before was
    assert value(metrics, "budget_overruns_total") == 15
    assert value(metrics, "prefetches_total", result="hit") == 5
    assert value(metrics, "engine_busy_seconds_total", engine="compute") == 2.0 + 2.2
    assert value(metrics, "executor_restarts_total") == 1
    metrics.tick(tick(400_000, counters={"overruns": 1}))  # a restart that nobody told
    assert value(metrics, "budget_overruns_total") == 16


def test_requests_are_counted_by_protocol_task_and_code_only() -> None:
    metrics = made("a")
    metrics.begun()
    assert value(metrics, "requests_in_flight") == 1
    metrics.ended()
    metrics.answered("oip-http", "a", 200, 0.0004)
    for number in range(1_000):
        metrics.answered("oip-http", f"guess{number}", 404, None)
        metrics.answered(f"made up {number}", "", 200, None)
    assert value(metrics, "requests_total", protocol="oip-http", task="a", code="200") == 1
    assert value(metrics, "requests_total", protocol="oip-http", task="", code="404") == 1_000
    assert value(metrics, "requests_total", protocol="http", task="", code="200") == 1_000
    assert value(metrics, "gateway_overhead_seconds_count") == 1
    assert value(metrics, "gateway_overhead_seconds_bucket", le="0.0005") == 1
    assert len(metrics.text()[0]) < 30_000


def test_ticks_of_tasks_that_nobody_planned_make_no_labels() -> None:
    metrics = made("a")
    before = len(metrics.text()[0])
    for number in range(100):
        tallies = {f"x{number}": {"done": 1, "missed": 1}}
        metrics.tick(tick(100_000, [job(f"x{number}", 0, 1_000)], tasks=tallies, jobs_lost=1))
    assert len(metrics.text()[0]) < before + 1_000


def test_what_is_no_longer_planned_has_no_bound_but_keeps_its_counts() -> None:
    metrics = made("a", "b")
    metrics.tick(tick(100_000, [job("b", 0, 1_000)]))
    metrics.plan(plan(setup("a")))
    assert value(metrics, "response_bound_seconds", task="b") is None
    assert value(metrics, "jobs_total", task="b", outcome="done") == 1


def test_the_guarantee_is_told_with_its_premises() -> None:
    metrics = made("a")
    metrics.text()
    assert value(metrics, "guarantee_valid") == 1
    metrics._premises.tick(tick(1, peak_bytes=BUDGET + 1))
    for _ in range(2):
        metrics.text()
    assert value(metrics, "guarantee_valid") == 0
    assert value(metrics, "premise_broken", premise="memory") == 1
    assert value(metrics, "premise_broken", premise="deadlines") == 0
    assert value(metrics, "premise_breaches_total", premise="memory") == 1


def test_both_formats_can_be_read_and_every_name_has_its_unit() -> None:
    metrics = made("a")
    metrics.answered("grpc", "a", 200, 0.001)
    metrics.tick(tick(100_000, [job("a", 0, 1_000)]))
    text, kind = metrics.text()
    assert kind.startswith("text/plain")
    families = {family.name: family for family in prometheus(text.decode())}
    text, kind = metrics.text("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text") and text.endswith(b"# EOF\n")
    assert {family.name for family in openmetrics(text.decode())} >= {"narrowboat_response_seconds"}
    assert all(name.startswith("narrowboat_") for name in families)
    timed = [name for name in families if any(word in name for word in ("busy", "response", "deadline", "overhead"))]
    other = ("narrowboat_deadline_misses", "narrowboat_deadline_misses_created")
    assert all(name.endswith(("_seconds", "_seconds_created")) or name in other for name in timed)


def test_a_request_and_a_job_cost_some_microseconds() -> None:
    metrics = made("a")
    jobs = [job("a", number, number * 20_000) for number in range(5_000)]
    begun = time.perf_counter()
    metrics.tick(tick(100_000_000, jobs))
    for _ in jobs:
        metrics.begun()
        metrics.answered("oip-http", "a", 200, 0.0004)
        metrics.ended()
    assert (time.perf_counter() - begun) / len(jobs) < 100e-6
