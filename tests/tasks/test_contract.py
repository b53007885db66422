"""The bucket at the door lets in what the analysis assumes, and all of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from narrowboat.tasks.analysis.model import Arrival
from narrowboat.tasks.contract import Bucket

times = st.lists(st.integers(0, 200), min_size=1, max_size=40).map(sorted)


@given(times, st.integers(1, 30), st.integers(1, 5))
def test_what_is_let_in_never_exceeds_the_arrival_curve(arrivals: list[int], period: int, burst: int) -> None:
    curve, bucket = Arrival.token_bucket(burst, period), Bucket(period, (burst - 1) * period)
    taken = []
    for now in arrivals:
        if not bucket.wait(now):
            bucket.take(now)
            taken.append(now)
    for i, first in enumerate(taken):
        for n, last in enumerate(taken[i:], 1):
            assert n <= curve.eta(last - first + 1)


@given(times, st.integers(1, 30), st.integers(1, 5))
def test_what_is_refused_would_have_exceeded_it(arrivals: list[int], period: int, burst: int) -> None:
    curve, bucket = Arrival.token_bucket(burst, period), Bucket(period, (burst - 1) * period)
    taken: list[int] = []
    for now in arrivals:
        if wait := bucket.wait(now):
            assert any(len(taken) - i + 1 > curve.eta(now - first + 1) for i, first in enumerate(taken))
            assert bucket.wait(now + wait) == 0 and bucket.wait(now + wait - 1) == 1
        else:
            bucket.take(now)
            taken.append(now)


def test_a_contract_that_changes_does_not_forget_what_was_spent() -> None:
    before = Bucket(10, 0)
    before.take(100)
    after = Bucket(30, 0)
    after.go_on_from(before)
    assert after.wait(110) == 20
