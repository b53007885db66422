"""What a run writes down, when it has no end, and what it tells those who watch."""

from __future__ import annotations

import json

import pytest

from narrowboat.tasks.execute.account import Account
from narrowboat.tasks.execute.ground import HostGround
from narrowboat.tasks.execute.picture import picture, plain
from narrowboat.tasks.job import Job, TaskFacts
from narrowboat.tasks.policy.action import Action, Do, Engine, View
from narrowboat.tasks.record import EXPIRED, WITHDRAWN, JobRecord, beyond

TASK = TaskFacts("a", 0, (0,), (5,), (0,), deadline=100, period=100)


class NoSpace:
    """A space of which nothing is used."""

    hits = 3

    class pool:  # noqa: N801 - stands for an object
        nbytes, free_bytes = 100, 40


def work(account: Account, jobs: int) -> None:
    for number in range(jobs):
        told = JobRecord("a", number, number * 100, number * 100 + 100)
        account.released(told, number * 100 + 7)
        action = Action(Do.COMPUTE, TASK, Job(TASK, number, number * 100))
        account.segment(Engine.COMPUTE, "compute", action, number * 100, number * 100 + 5)
        account.overrun("a", number, "compute", 0, 5, 4)
        account.ended(told, number * 100 + 50, "done")


def test_a_record_that_is_kept_short_has_the_last_of_everything_and_counts_all() -> None:
    account = Account(1 << 30, HostGround(), keep=10)
    work(account, 1000)
    assert [job.number for job in account.record.jobs] == list(range(990, 1000))
    assert len(account.record.segments) == len(account.late_wakes) == 10
    assert account.counters["overruns"] == 1000 and len(account.first_overruns) == 20
    assert (
        account.tally["a"] == {"done": 1000, "missed": 0, "refused": 0, "slack_us": 50}
        and account.busy["compute"] == 5000
    )


def test_a_record_that_is_not_kept_short_has_all() -> None:
    account = Account(1 << 30, HostGround())
    work(account, 1000)
    assert len(account.record.jobs) == len(account.record.segments) == 1000


@pytest.mark.parametrize("jobs", [3, 5000])
def test_news_are_told_once_and_are_bounded_and_what_is_left_out_is_counted(jobs: int) -> None:
    account = Account(1 << 30, HostGround())
    work(account, jobs)
    told = plain(picture(View(0), [], account, NoSpace(), 99))  # type: ignore[arg-type]
    assert len(told["jobs"]) + told["jobs_lost"] == len(told["segments"]) + told["segments_lost"] == jobs
    assert told["late_wake_us"] == 7 and told["counters"] == {"overruns": jobs, "blocks_found": 3}
    assert told["pools"]["swap"] == 60 and told["now_us"] == 99
    assert len(json.dumps(told)) < 1 << 17
    assert told["jobs"][0]["number"] == 0 and told["segments"][0][:3] == ("compute", "compute", "a")
    again = plain(picture(View(0), [], account, NoSpace(), 100))  # type: ignore[arg-type]
    assert again["jobs"] == [] and again["segments"] == [] and again["jobs_lost"] == 0


def test_what_is_beyond_its_contract_is_refused_and_no_miss() -> None:
    account = Account(1 << 30, HostGround())
    for outcome, cause in (
        ("skipped", beyond(5)),
        ("skipped", EXPIRED),
        ("late", "over its deadline"),
        ("done", ""),
        ("aborted", WITHDRAWN),
    ):
        account.ended(JobRecord("a", 0, 0, 100), 50, outcome, cause)
    assert account.tally["a"] == {"done": 1, "missed": 2, "refused": 2, "slack_us": 50}
