"""Where tasks' slots lie in shared memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import StorageError
from narrowboat.tasks.execute.exchange import Areas, Exchange, Slots


@pytest.fixture
def exchange() -> Iterator[Exchange]:
    made = Exchange.create()
    yield made
    made.close()


def taken_bytes(exchange: Exchange) -> int:
    return os.fstat(exchange.descriptors[0]).st_blocks * 512


STEP = st.one_of(st.tuples(st.integers(0, 20_000), st.integers(1, 6)), st.integers(0, 30))


@settings(max_examples=60, deadline=None)
@given(st.lists(STEP, max_size=30))
def test_slots_never_overlap_and_pages_go_back(steps: list[tuple[int, int] | int]) -> None:
    exchange = Exchange.create()
    try:
        areas, there = Areas(exchange), list[Slots]()
        for step in steps:
            if isinstance(step, tuple):
                there.append(areas.make(*step))
                begin = there[-1].start
                exchange.memory[begin] = 1
            elif there:
                areas.retire(there.pop(step % len(there)))
            spans = sorted((area.start, area.start + area.nbytes * area.count) for area in there)
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            assert all(start % 4096 == 0 and exchange.memory[start] == 1 for start, _ in spans)
        for area in there:
            areas.retire(area)
        assert taken_bytes(exchange) == 0
    finally:
        exchange.close()


def test_memory_of_a_task_that_is_gone_stays_until_its_last_job_has_ended(exchange: Exchange) -> None:
    areas = Areas(exchange)
    area = areas.make(1 << 20, 2)
    slot = area.take()
    assert slot is not None
    exchange.memory[slot : slot + 5] = b"alive"
    areas.retire(area)
    assert bytes(exchange.memory[slot : slot + 5]) == b"alive"
    assert areas.make(1 << 20, 2).start != area.start
    area.give(slot)
    assert areas.make(64, 1).start == area.start
    assert bytes(exchange.memory[slot : slot + 5]) == bytes(5)


def test_there_are_as_many_slots_as_were_asked_for(exchange: Exchange) -> None:
    area = Areas(exchange).make(100, 3)
    taken = [area.take() for _ in range(4)]
    assert taken[3] is None and len({*taken[:3]}) == 3 and not area.idle


def test_more_than_the_addresses_is_refused(exchange: Exchange) -> None:
    with pytest.raises(StorageError, match="larger than shared memory"):
        Areas(exchange).make(1 << 30, 100)
