"""Which jobs are dropped, and when."""

from __future__ import annotations

import pytest

from narrowboat.tasks.execute.expiry import hopeless
from narrowboat.tasks.execute.running import Underway
from narrowboat.tasks.job import Job, TaskFacts
from narrowboat.tasks.policy.action import Action, Do, Engine, View
from narrowboat.tasks.record import EXPIRED, UNWANTED, WITHDRAWN, JobRecord

TASK = TaskFacts("a", 0, (1, 1), (5, 5), (8, 8), deadline=100, period=100)


@pytest.mark.parametrize(
    ("started", "computing", "about", "now", "said"),
    [
        (None, False, {}, 99, None),
        (None, False, {}, 100, EXPIRED),
        (3, False, {}, 100, None),  # late, and somebody waits for it
        (None, False, {"expires": 20}, 20, UNWANTED),
        (None, False, {"expires": 20}, 19, None),
        (3, False, {"expires": 20}, 20, UNWANTED),
        (3, True, {"expires": 20}, 20, None),  # never in the middle of a block
        (None, False, {"withdrawn": True}, 0, WITHDRAWN),
        (3, False, {"withdrawn": True}, 0, WITHDRAWN),
        (3, True, {"withdrawn": True}, 0, None),
    ],
)
def test_a_job_is_dropped_when_it_is_of_no_use_and_only_at_a_boundary(
    started: int | None, computing: bool, about: dict[str, int], now: int, said: str | None
) -> None:
    job = Job(TASK, 0, 0, started=started)
    doing = {Engine.COMPUTE: Action(Do.COMPUTE, TASK, job)} if computing else {}
    under = {job: Underway(JobRecord("a", 0, 0, 100), (), **about)}  # type: ignore[arg-type]
    assert [cause for _, cause in hopeless(View(now, [job], doing), under, now)] == ([said] if said else [])
