"""The bounded ring between two processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.errors import UsageError
from narrowboat.tasks.execute.exchange import Exchange
from narrowboat.tasks.execute.ring import Ring


@contextmanager
def two_ends(slots: int, slot_bytes: int) -> Iterator[tuple[Ring, Ring]]:
    """One ring, from its writing and from its reading side."""
    memory = memoryview(bytearray(slots * slot_bytes))
    counts = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    try:
        yield Ring(memory, slots, slot_bytes, *counts), Ring(memory, slots, slot_bytes, *counts)
    finally:
        for count in counts:
            os.close(count)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5), st.lists(st.one_of(st.binary(max_size=12), st.none()), max_size=60))
def test_messages_come_once_in_order_and_never_more_than_there_are_slots(
    slots: int, steps: list[bytes | None]
) -> None:
    with two_ends(slots, 16) as (writes, reads):
        model: deque[bytes] = deque()
        for step in steps:
            if step is None:
                assert reads.take() == list(model)
                model.clear()
            else:
                assert writes.put(step) == (len(model) < slots)
                if len(model) < slots:
                    model.append(step)
        assert reads.take() == list(model)


def test_a_message_longer_than_a_slot_is_refused_and_the_ring_goes_on() -> None:
    with two_ends(2, 16) as (writes, reads):
        with pytest.raises(UsageError, match="longer than"):
            writes.put(bytes(13))
        assert writes.put(bytes(writes.most)) and reads.take() == [bytes(12)]


def test_whoever_writes_waits_for_room_and_no_longer_than_it_was_told() -> None:
    with two_ends(1, 16) as (writes, reads):
        assert writes.put(b"a") and not writes.put(b"b", timeout=0.05)
        reader = threading.Timer(0.05, reads.take)
        reader.start()
        assert writes.put(b"c", timeout=20)
        reader.join()
        assert reads.take() == [b"c"]


def test_many_threads_write_and_nothing_is_lost_or_torn() -> None:
    with two_ends(4, 16) as (writes, reads):
        found: list[bytes] = []

        def write(who: int) -> None:
            for number in range(300):
                while not writes.put(b"%d %d" % (who, number), timeout=5.0):
                    pass

        threads = [threading.Thread(target=write, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        while len(found) < 1200 and reads.wait(timeout=20):
            found += reads.take()
        for thread in threads:
            thread.join()
    for who in range(4):
        mine = [message for message in found if message.startswith(b"%d " % who)]
        assert mine == [b"%d %d" % (who, number) for number in range(300)]


CHILD = """
import sys
from narrowboat.tasks.execute.exchange import Exchange

exchange = Exchange.attach([int(number) for number in sys.argv[1:]])
left = 2000
while left:
    exchange.offers.wait()
    for message in exchange.offers.take():
        exchange.memory[1 << 23 : (1 << 23) + len(message)] = message
        while not exchange.answers.put(message[::-1], timeout=10):
            pass
        left -= 1
"""


def test_another_process_answers_through_the_exchange_and_leaves_nothing_behind() -> None:
    files = len(os.listdir("/proc/self/fd"))
    exchange = Exchange.create()
    descriptors = exchange.descriptors
    command = [sys.executable, "-c", CHILD, *map(str, descriptors)]
    with subprocess.Popen(command, pass_fds=descriptors) as child:
        asked = [b"%d" % (number + 1_000_000) for number in range(2000)]
        answers: list[bytes] = []
        for message in asked:
            while not exchange.offers.put(message, timeout=0.01):
                answers += exchange.answers.take()
        while len(answers) < len(asked) and exchange.answers.wait(timeout=30):
            answers += exchange.answers.take()
        assert child.wait(30) == 0
    assert answers == [message[::-1] for message in asked]
    assert bytes(exchange.memory[1 << 23 : (1 << 23) + 7]) == asked[-1]
    exchange.close()
    assert len(os.listdir("/proc/self/fd")) == files
