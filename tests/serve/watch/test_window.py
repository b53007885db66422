"""What is kept of the last seconds: whole jobs, within bounds, as a record that can be read and judged."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from narrowboat.serve.watch.trace_file import pieces
from narrowboat.serve.watch.window import Window
from narrowboat.tasks.conform import conform
from narrowboat.tasks.record import Record
from serve_watch_kit import BUDGET, MIB, job, parts, plan, setup, tick


def window_of(count: int, *names: str, every: int = 20_000, **kwargs: float) -> Window:
    """So many jobs in turn, a tick each."""
    window = Window(**kwargs)  # type: ignore[arg-type]
    window.plan(plan(setup(*names)), setup(*names))
    window.granted({"lost": []})
    for number in range(count):
        release = 1_000 + number * every
        name = names[number % len(names)]
        window.tick(tick(release + 5_000, [job(name, number // len(names), release)]))
    return window


def test_a_quiet_run_is_a_record_that_keeps_every_premise(tmp_path: Path) -> None:
    record = window_of(50, "a", "b").record(10)
    assert len(record.jobs) == 50 and len(record.segments) == 100
    (tmp_path / "trace.json").write_bytes(b"".join(pieces(record)))
    read = Record.load(tmp_path / "trace.json")
    assert read == record
    judged = conform(read)
    broken = {premise.name for premise in judged.premises if not premise.holds}
    assert broken <= {"no rest while a job waits"}  # the made-up jobs end a little after their segments
    assert judged.missed == 0


def test_the_file_is_what_save_writes() -> None:
    record = window_of(700, "a").record(100)
    assert json.loads(b"".join(pieces(record))) == json.loads(json.dumps(record.as_json()))
    assert json.loads(b"".join(pieces(Record()))) == json.loads(json.dumps(Record().as_json()))


def test_a_record_of_some_seconds_has_these_only() -> None:
    record = window_of(200, "a").record(1.0)
    assert 49 <= len(record.jobs) <= 52
    assert min(job.release for job in record.jobs) >= record.end - 1_030_000


def test_memory_that_did_not_change_is_told_all_the_same() -> None:
    record = window_of(200, "a").record(1.0)
    assert record.memory == [(record.premises["window"]["begin_us"], 20 * MIB)]


def test_it_begins_when_nothing_was_under_way() -> None:
    window = Window()
    window.plan(plan(setup("a", "b")), setup("a", "b"))
    long = job("a", 0, 1_000_000, 900_000)
    window.tick(tick(1_950_000, [job("b", 0, 1_200_000), long]))
    window.tick(tick(2_000_000, [job("b", 1, 1_960_000)]))
    record = window.record(0.15)
    assert [(each.task, each.number) for each in record.jobs] == [("a", 0), ("b", 0), ("b", 1)]


def test_what_is_too_old_or_too_much_is_forgotten_and_the_latter_counted() -> None:
    window = window_of(200, "a", seconds=1.0)
    assert len(window.record(60).jobs) <= 52
    assert window.lost["dropped"] == 0
    window = window_of(200, "a", most=20)
    assert len(window.record(60).jobs) == 20
    assert window.lost["dropped"] > 0
    assert window.record(60).premises["window"]["dropped"] == window.lost["dropped"]


def test_what_ticks_do_not_list_is_said() -> None:
    window = window_of(3, "a")
    window.tick(tick(100_000, [], jobs_lost=7, segments_lost=9))
    assert dict(window.lost) == {"jobs": 7, "segments": 9, "dropped": 0}
    assert window.record().premises["window"]["jobs"] == 7


def test_a_job_under_way_is_unfinished_and_one_that_was_never_listed_is_left_out() -> None:
    window = Window()
    window.plan(plan(setup("a", "b")), setup("a", "b"))
    going, lost = job("a", 4, 50_000), job("b", 9, 40_000)
    window.tick(tick(60_000, [], pending=["a #4", "b #10"], segments=[*parts(lost), *parts(going)]))
    record = window.record()
    assert [(each.task, each.number, each.outcome) for each in record.jobs] == [("a", 4, "unfinished")]
    assert {part.task for part in record.segments} == {"a"}
    Record.from_json(json.loads(json.dumps(record.as_json())))


def test_other_plans_are_changes_of_the_record() -> None:
    window = window_of(5, "a")
    more = setup("a", "b")
    window.plan(plan(more), more, begin=120_000, end=125_000, allowed=9_000)
    window.tick(tick(200_000, [job("b", 0, 130_000)]))
    record = Record.from_json(json.loads(json.dumps(window.record().as_json())))
    assert [len(stretch.jobs) for stretch in record.stretches()] == [5, 1]
    assert (record.changes[0].end - record.changes[0].begin, record.changes[0].allowed) == (5_000, 9_000)
    window.tick(tick(300_000_000))
    assert window.record().setup == more  # the change itself has been forgotten


def test_many_changes_stay_bounded() -> None:
    window = window_of(3, "a")
    for number in range(1_000):
        window.tick(tick(100_000 + number))
        window.plan(plan(setup("a")), setup("a", delay=number))
    assert 200 < len(window.record().changes) <= 257


def test_a_plan_that_is_told_again_is_no_change() -> None:
    window = window_of(3, "a")
    window.plan(plan(setup("a")), setup("a"))
    assert window.record().changes == []


def test_jobs_of_tasks_that_are_gone_do_not_spoil_the_file() -> None:
    window = window_of(5, "a", "b")
    window.plan(plan(setup("a")), setup("a"))  # without saying when
    window.tick(tick(300_000, [job("b", 7, 200_000), job("a", 7, 220_000)]))
    record = Record.from_json(json.loads(json.dumps(window.record().as_json())))
    assert ("b", 7) not in {(each.task, each.number) for each in record.jobs}
    assert ("a", 7) in {(each.task, each.number) for each in record.jobs}


def test_after_a_restart_there_are_two_runs() -> None:
    window = window_of(5, "a")
    window.restarted()
    window.tick(tick(5_000, [job("a", 0, 500)]))
    assert len(window.record().jobs) == 1 and window.record().setup == setup("a")
    assert len(window.record(before=True).jobs) == 5
    assert window.restarts == 1
    assert Window().record(before=True) == Record()


def test_what_the_machine_gave_is_told_and_nothing_else_is_claimed() -> None:
    window = Window()
    window.plan(plan(setup("a")), setup("a"))
    quiet = tick(10_000, [job("a", 0, 1_000)], peak_bytes=BUDGET + MIB)
    del quiet["major_faults"]
    window.tick(quiet)
    said = {premise.name: premise for premise in conform(window.record()).premises}
    assert not said["memory within the budget"].holds
    assert "not told" in said["real-time conditions"].said
    window.granted({"lost": []})
    window.tick(tick(20_000))
    said = {premise.name: premise for premise in conform(window.record()).premises}
    assert said["real-time conditions"].holds
    window.tick(tick(30_000, major_faults=3))
    assert window.record().premises["major_faults"] == 3


def test_a_thousand_jobs_a_second_stay_within_some_megabytes() -> None:
    window = Window(seconds=60, most=10_000)
    window.plan(plan(setup("a")), setup("a"))
    tracemalloc.start()
    for number in range(600):
        now = number * 100_000
        ended = [job("a", number * 100 + k, now + k * 1_000, 900) for k in range(100)]
        window.tick(tick(now + 100_000, json.loads(json.dumps(ended))))
        if number == 150:
            before, _ = tracemalloc.get_traced_memory()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after < before + MIB and after < 8 * MIB
    assert len(window.record().jobs) == 10_000


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        Window(seconds=0)
