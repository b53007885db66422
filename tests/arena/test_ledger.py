"""The ledger: who holds how many bytes, and the most there ever were."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from narrowboat.arena.ledger import Ledger

CHANGES = st.lists(
    st.tuples(st.sampled_from(["resident", "window", "escaped"]), st.integers(-100, 100), st.booleans())
)


@given(CHANGES)
def test_totals_and_peak_follow_every_change(changes: list[tuple[str, int, bool]]) -> None:
    ledger = Ledger()
    expected: dict[str, int] = {}
    peak = 0
    for name, nbytes, absolute in changes:
        if absolute:
            ledger.set(name, nbytes)
            expected[name] = nbytes
        else:
            ledger.add(name, nbytes)
            expected[name] = expected.get(name, 0) + nbytes
        peak = max(peak, sum(expected.values()))
    assert ledger.held() == {name: nbytes for name, nbytes in expected.items() if nbytes}
    assert ledger.total == sum(expected.values())
    assert ledger.peak == peak


def test_what_is_told_is_a_copy() -> None:
    ledger = Ledger()
    ledger.add("window", 5)
    ledger.held()["window"] = 7
    assert ledger.held() == {"window": 5}


def test_threads_lose_no_bytes() -> None:
    ledger = Ledger()

    def add() -> None:
        for _ in range(2000):
            ledger.add("window", 3)
            ledger.add("window", -1)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.held() == {"window": 16000}
