"""Rates and counts, with a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.errors import BeyondContractError, NotServingError
from narrowboat.serve.guard.limits import Meter, client_of
from narrowboat.serve.settings import Limits


def test_a_burst_is_let_in_and_then_the_rate() -> None:
    meter = Meter(Limits(rate=10, burst=3))
    for _ in range(3):
        meter.charge("a", 0.0)
    with pytest.raises(BeyondContractError) as refused:
        meter.charge("a", 0.0)
    assert refused.value.retry_after == pytest.approx(0.1)
    meter.charge("b", 0.0)  # another client has a bucket of its own
    meter.charge("a", 0.1)
    with pytest.raises(BeyondContractError):
        meter.charge("a", 0.1)


@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=80))
def test_no_span_of_time_lets_in_more_than_the_bucket(gaps: list[float]) -> None:
    meter, now, let_in = Meter(Limits(rate=10, burst=3)), 0.0, []
    for gap in gaps:
        now += gap
        try:
            meter.charge("a", now)
        except BeyondContractError as refused:
            assert refused.retry_after is not None and 0 < refused.retry_after <= 0.1 + 1e-9
        else:
            let_in.append(now)
    for first, begin in enumerate(let_in):
        for last, end in enumerate(let_in[first:], start=first):
            assert last - first + 1 <= 3 + (end - begin) * 10 + 1e-6


def test_one_client_cannot_have_too_much_under_way() -> None:
    meter = Meter(Limits(requests=3, requests_per_client=2))
    meter.enter("a", 0)
    meter.enter("a", 0)
    with pytest.raises(BeyondContractError):
        meter.enter("a", 0)
    meter.enter("b", 0)
    with pytest.raises(NotServingError):  # all of them together
        meter.enter("c", 0)
    meter.leave("a")
    meter.enter("c", 0)
    assert meter.active == 3


def test_bodies_are_bounded_together() -> None:
    meter = Meter(Limits(body_bytes=100, held_bytes=150))
    meter.enter("a", 0)
    meter.enter("b", 0)
    meter.hold(100)
    with pytest.raises(NotServingError):
        meter.hold(100)
    meter.leave("a", 100)
    meter.hold(100)
    meter.leave("b", 100)
    assert (meter.held, meter.active) == (0, 0)


def test_the_table_of_clients_is_bounded_and_never_forgets_one_under_way() -> None:
    meter = Meter(Limits(clients=10, rate=1, burst=1))
    meter.enter("kept", 0)
    for number in range(1000):
        meter.charge(str(number), number)
    assert len(meter) <= 11
    meter.leave("kept")
    with pytest.raises(BeyondContractError):  # it was remembered
        meter.charge("999", 999.5)


def test_clients_are_told_apart_by_token_then_address() -> None:
    assert client_of("digest", "192.0.2.1") == "digest"
    assert client_of("", "192.0.2.1") == "192.0.2.1" == client_of("", "::ffff:192.0.2.1")
    assert client_of("", "2001:db8::1") == client_of("", "2001:db8::ffff") != client_of("", "2001:db8:0:1::1")
    assert client_of("", None) == ""
