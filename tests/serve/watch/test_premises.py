"""What breaks the promise is seen, named and counted; what does not is not."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.serve.watch.premises import Premises
from narrowboat.serve.watch.withheld import Withheld
from narrowboat.tasks.conform import conform
from narrowboat.tasks.record import EXPIRED, UNWANTED, WITHDRAWN, JobRecord, Record, Segment
from serve_watch_kit import BUDGET, COMPUTE, Clock, job, parts, plan, setup, tick


def made(**options: Any) -> tuple[Premises, Clock]:
    clock = Clock()
    premises = Premises(clock=clock)
    told = setup("a", "b", best_effort=("b",), **options)
    premises.plan(plan(told), told)
    premises.state("serving")
    return premises, clock


def names(premises: Premises) -> list[str]:
    return [each["premise"] for each in premises.broken]


def test_before_a_plan_nothing_is_promised() -> None:
    premises = Premises()
    assert not premises.valid and names(premises) == ["admission"]


def test_a_quiet_run_is_valid_and_jobs_are_counted() -> None:
    premises, _ = made()
    premises.tick(tick(100_000, [job("a", 0, 1_000), job("b", 0, 9_000)]))
    assert premises.valid and premises.broken == []
    told = premises.as_json()
    assert (told["valid"], told["valid_since_start"], told["jobs"], told["missed"]) == (True, True, 1, 0)


def test_a_missed_deadline_is_named_and_forgiven_after_a_minute_but_not_forgotten() -> None:
    premises, clock = made()
    late = job("a", 3, 1_000, 25_000, outcome="late", cause="over its deadline")
    premises.tick(tick(100_000, [late]))
    assert names(premises) == ["deadlines", "bounds"]
    (first, _) = premises.broken
    assert "a #3" in first["said"] and first["count"] == 1 and first["since"] == clock.now
    clock.now += 61
    assert premises.valid and premises.broken == []
    told = premises.as_json()
    assert not told["valid_since_start"] and told["missed"] == 1
    assert {each["premise"] for each in told["broken_since_start"]} == {"deadlines", "bounds"}


def test_what_was_promised_nothing_or_never_let_in_breaks_nothing() -> None:
    premises, _ = made()
    expired = {"outcome": "skipped", "cause": EXPIRED}
    premises.tick(tick(90_000, [job("b", 0, 0, None, **expired)]))
    premises.tick(tick(90_000, [job("a", 0, 0, None, outcome="skipped", cause="beyond its contract: wait")]))
    premises.tick(tick(90_000, [job("a", 1, 0, None, outcome="aborted", cause=WITHDRAWN)]))
    premises.tick(tick(90_000, [job("a", 2, 0, None, outcome="skipped", cause=UNWANTED)]))
    assert premises.valid
    premises.tick(tick(15_000, [job("a", 3, 0, None, **expired)]))  # before what it was promised
    assert premises.valid
    premises.tick(tick(90_000, [job("a", 4, 0, None, **expired)]))
    assert names(premises) == ["deadlines"]


def test_a_client_that_wants_it_sooner_does_not_break_the_promise() -> None:
    premises, _ = made()
    sooner = {"due": 5_000, "outcome": "skipped", "cause": EXPIRED}
    premises.tick(tick(90_000, [job("a", 0, 0, None, **sooner)]))
    premises.tick(tick(90_000, [job("a", 1, 0, 9_000, due=5_000, outcome="late", cause="over its deadline")]))
    assert premises.valid
    premises.tick(tick(90_000, [job("a", 2, 0, 21_000, due=5_000, outcome="late", cause="over its deadline")]))
    assert names(premises) == ["deadlines", "bounds"]


def test_a_segment_may_be_over_by_what_the_core_may_be_withheld() -> None:
    premises, _ = made(delay=50_000)
    told = job("a", 0, 1_000)
    premises.tick(tick(90_000, segments=parts(told, compute=COMPUTE + 40_000), counters={"overruns": 1}))
    assert premises.valid
    told = job("a", 1, 95_000)
    premises.tick(tick(200_000, segments=parts(told, compute=COMPUTE + 40_000), counters={"overruns": 2}))
    assert names(premises) == ["segments"]
    assert "compute of a block 0" in premises.broken[0]["said"]
    premises.tick(tick(300_000, segments=parts(job("a", 2, 250_000)), counters={"overruns": 2}))
    assert premises.broken[0]["count"] == 1  # told once, not with everything that comes after


def test_overruns_that_were_not_listed_cannot_be_judged() -> None:
    premises, _ = made()
    premises.tick(tick(90_000, segments=[], segments_lost=4, counters={"overruns": 0}))
    assert premises.valid
    premises.tick(tick(90_000, segments=[], segments_lost=4, counters={"overruns": 2}))
    assert names(premises) == ["segments"] and premises.broken[0]["count"] == 2


def test_memory_releases_and_pages_are_watched() -> None:
    premises, _ = made(delay=50_000)
    premises.tick(tick(90_000, peak_bytes=BUDGET, late_wake_us=50_000))
    assert premises.valid
    premises.tick(tick(91_000, peak_bytes=BUDGET + 1))
    premises.tick(tick(92_000, late_wake_us=60_000))
    premises.tick(tick(93_000, major_faults=2))
    premises.tick(tick(94_000, major_faults=2))
    assert names(premises) == ["memory", "releases", "real-time"]
    assert premises.broken[2]["count"] == 2


def test_a_restart_breaks_it_and_the_counts_of_the_next_process_begin_anew() -> None:
    premises, clock = made()
    premises.tick(tick(90_000, counters={"overruns": 50}, segments_lost=0))
    premises.state("restarting", "the executor was killed by SIGKILL")
    premises.restarted()
    assert names(premises) == ["executor"] and "SIGKILL" in premises.broken[0]["said"]
    clock.now += 100
    assert not premises.valid  # it is still down
    premises.state("serving")
    assert premises.valid
    premises.tick(tick(90_000, counters={"overruns": 1}, segments_lost=1, segments=[]))
    assert names(premises) == ["segments"]


def test_draining_promises_nothing_and_breaks_nothing() -> None:
    premises, _ = made()
    premises.state("draining", "stopping")
    assert not premises.valid and premises.as_json()["valid_since_start"]


def test_a_set_that_is_not_admitted_and_a_class_that_is_not_granted_are_said() -> None:
    premises, _ = made()
    told = setup("a")
    premises.plan(plan(told, admitted=False, reasons=("too slow",)), told)
    premises.granted({"lost": ["no right to SCHED_FIFO"]})
    assert {each["premise"]: each["said"] for each in premises.broken} == {
        "admission": "too slow",
        "real-time": "no right to SCHED_FIFO",
    }


def test_ticks_of_a_plan_that_is_gone_are_harmless() -> None:
    premises, _ = made()
    premises.tick(tick(90_000, [job("gone", 0, 1_000)], segments=[["load", "load", "a", 0, 7, 0, 9_000_000, 0]]))
    assert premises.valid


def test_a_thousand_breaches_a_second_stay_bounded() -> None:
    premises, clock = made()
    for number in range(20_000):
        clock.now += 0.01
        premises.tick(tick(90_000 + number, peak_bytes=BUDGET + 1))
    assert len(premises._breaches["memory"]._seconds) <= 61
    assert 5_900 <= premises.broken[0]["count"] <= 6_001


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(1, 30_000)), min_size=1, max_size=25),
    st.sampled_from([0.5, 0.9, 0.95, 1.0]),
    st.integers(0, 40_000),
)
def test_segments_are_judged_as_conform_judges_them(spans: list[tuple[int, int]], share: float, delay: int) -> None:
    """Up to the first that the supply does not allow for."""
    told = {**setup("a", share=share, delay=delay), "overhead_us": 0}
    withheld, at, segments, verdicts = Withheld(share, delay), 0, [], []
    for number, (gap, took) in enumerate(spans):
        begin, at = at + gap, at + gap + took
        segments.append(Segment("compute", "compute", "a", number, 0, begin, at))
        if took > COMPUTE:
            verdicts.append(withheld.bear(begin, at, took - COMPUTE))
        record = Record(told, [JobRecord("a", n, 0, 9) for n in range(number + 1)], list(segments), end=at)
        judged = next(p for p in conform(record).premises if p.name == "segments within their budgets")
        assert judged.holds == all(verdicts)
        if not judged.holds:
            return
