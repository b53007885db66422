"""Spilled storages come back bit for bit, in bounded memory."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from narrowboat.errors import SpillError
from narrowboat.machine.data_limit import data_limit, is_out_of_memory
from narrowboat.machine.memory import process_memory
from narrowboat.train.spill import SpillPool, Ticket
from narrowboat.train.spill_file import CHUNK, SpillFile
from narrowboat.train.spill_slots import PAGE
from spill_kit import made, raw

MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[SpillPool]:
    with SpillPool(tmp_path, in_flight=64 * MIB) as pool:
        yield pool


class Gate:
    """Holds the writer until it is opened, and counts what it wrote."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.written = 0
        real = SpillFile.write

        def write(file: SpillFile, offset: int, address: int, nbytes: int) -> None:
            assert self.open.wait(30)
            real(file, offset, address, nbytes)
            self.written += 1

        monkeypatch.setattr(SpillFile, "write", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, pool: SpillPool) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()  # or closing the pool would wait


def in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()), daemon=True)
    thread.start()
    return thread, answers


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(0, 3 * PAGE), st.sampled_from([CHUNK - 1, CHUNK, 2 * CHUNK + 5])), st.booleans()
        ),
        max_size=8,
    )
)
def test_whatever_is_written_comes_back(pool: SpillPool, sizes: list[tuple[int, bool]]) -> None:
    want = [raw(made(nbytes, seed)) for seed, (nbytes, _) in enumerate(sizes)]
    tickets = [pool.write(made(nbytes, seed)) for seed, (nbytes, _) in enumerate(sizes)]
    pool.flush()
    for ticket, (_, ahead) in zip(tickets, sizes, strict=True):
        if ahead:
            assert pool.prefetch(ticket)
    for ticket, bits in reversed(list(zip(tickets, want, strict=True))):
        assert raw(pool.read(ticket)) == bits
        pool.release(ticket)
    assert (pool.spilled_bytes, pool.bytes_in_flight) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_a_view_of_any_dtype_can_be_made_again(pool: SpillPool, dtype: torch.dtype) -> None:
    tensor = torch.randn(64, 33).mul(9).to(dtype)
    view = tensor[3:50, 1:20].t()
    ticket = pool.write(view.untyped_storage())
    pool.flush()
    again = torch.empty(0, dtype=dtype).set_(pool.read(ticket), view.storage_offset(), view.shape, view.stride())
    assert torch.equal(again, view)


def test_a_storage_read_back_is_page_aligned_and_spilled_again_without_staging(pool: SpillPool) -> None:
    first = pool.write(made(2 * PAGE))
    pool.flush()
    storage = pool.read(first)
    assert storage.data_ptr() % PAGE == 0
    assert storage.nbytes() == 2 * PAGE
    second = pool.write(storage)
    pool.flush()
    assert raw(pool.read(second)) == raw(made(2 * PAGE))


def test_what_is_still_being_written_is_given_back_as_it_is(pool: SpillPool, gate: Gate) -> None:
    storage = made(PAGE)
    ticket = pool.write(storage)
    assert pool.read(ticket).data_ptr() == storage.data_ptr()
    assert pool.prefetch(ticket)
    gate.open.set()
    pool.flush()
    assert pool.read(ticket).data_ptr() == storage.data_ptr(), "a prefetch keeps it in memory"
    assert pool.bytes_read == 0
    assert raw(pool.read(ticket)) == raw(storage)
    assert pool.bytes_read == PAGE


def test_the_pool_lets_go_of_what_is_written(pool: SpillPool) -> None:
    memory = mmap.mmap(-1, MIB)
    alive = weakref.ref(memory)
    ticket = pool.write(torch.frombuffer(memory, dtype=torch.uint8).untyped_storage())
    del memory
    pool.flush()
    gc.collect()
    assert alive() is None
    assert pool.bytes_in_flight == 0
    assert raw(pool.read(ticket)) == bytes(MIB)


def test_memory_read_back_goes_when_the_last_tensor_dies(pool: SpillPool) -> None:
    ticket = pool.write(torch.zeros(48 * MIB, dtype=torch.uint8).untyped_storage())
    pool.flush()
    before = process_memory().anon
    view = torch.empty(0, dtype=torch.uint8).set_(pool.read(ticket))[5:].clone
    held = process_memory().anon - before
    del view
    assert held > 40 * MIB
    assert process_memory().anon - before < 4 * MIB


def test_writing_waits_while_too_much_is_in_flight(tmp_path: Path, gate: Gate) -> None:
    with SpillPool(tmp_path, in_flight=2 * PAGE) as pool:
        pool.write(made(PAGE)), pool.write(made(PAGE))
        thread, answers = in_thread(lambda: pool.write(made(PAGE)))
        thread.join(0.2)
        assert not answers, "the third must wait"
        gate.open.set()
        thread.join(10)
        assert answers
        assert pool.seconds_waiting > 0.1


def test_a_storage_larger_than_the_bound_is_written_alone(tmp_path: Path) -> None:
    with SpillPool(tmp_path, in_flight=PAGE) as pool:
        tickets = [pool.write(made(5 * PAGE, seed)) for seed in range(3)]
        assert pool.bytes_in_flight <= 5 * PAGE
        pool.flush()
        assert not pool.prefetch(tickets[0]), "what is read ahead is memory more"
        assert [raw(pool.read(ticket)) for ticket in tickets] == [raw(made(5 * PAGE, seed)) for seed in range(3)]


def test_reading_ahead_stays_within_the_bound_and_makes_way_for_writes(tmp_path: Path) -> None:
    with SpillPool(tmp_path, in_flight=2 * PAGE) as pool:
        tickets = [pool.write(made(PAGE, seed)) for seed in range(4)]
        pool.flush()
        assert [pool.prefetch(ticket) for ticket in tickets] == [True, True, False, False]
        assert pool.prefetch(tickets[0]), "under way already"
        assert pool.bytes_in_flight == 2 * PAGE
        tickets.append(pool.write(made(2 * PAGE, 4)))
        pool.flush()
        sizes = [PAGE] * 4 + [2 * PAGE]
        want = [raw(made(size, seed)) for seed, size in enumerate(sizes)]
        assert [raw(pool.read(ticket)) for ticket in tickets] == want


def test_a_released_write_that_has_not_begun_is_not_made(pool: SpillPool, gate: Gate) -> None:
    tickets = [pool.write(made(PAGE)) for _ in range(3)]
    pool.release(tickets[2])
    gate.open.set()
    pool.flush()
    assert gate.written == 2
    assert pool.spilled_bytes == 2 * PAGE


def test_slots_are_used_again(pool: SpillPool) -> None:
    for _ in range(5):
        tickets = [pool.write(made(size)) for size in (PAGE, 7 * PAGE, 3 * PAGE)]
        pool.flush()
        for ticket in tickets:
            pool.release(ticket)
    assert pool.file_bytes == 11 * PAGE


def test_dropping_a_ticket_releases_it(pool: SpillPool) -> None:
    graph = [pool.write(made(PAGE)) for _ in range(3)]
    pool.flush()
    graph.append(graph)  # type: ignore[arg-type]  # a cycle, which only garbage collection finds
    del graph
    gc.collect()
    assert pool.spilled_bytes == 0


def test_release_never_waits(pool: SpillPool) -> None:
    ticket = pool.write(made(PAGE))
    pool.flush()
    with pool._lock:  # as in a finalizer that runs in the middle of another call of the same thread
        pool.release(ticket)
        pool.release(ticket)
    assert pool.spilled_bytes == 0
    with pytest.raises(SpillError, match="after it was released"):
        pool.read(ticket)


def test_a_slot_given_on_while_its_write_is_under_way_keeps_the_later_bytes(pool: SpillPool, gate: Gate) -> None:
    first = pool.write(made(PAGE, 1))
    time.sleep(0.05)  # the writer has it in hand
    pool.release(first)
    second = pool.write(made(PAGE, 2))
    gate.open.set()
    pool.flush()
    assert pool.file_bytes == PAGE
    assert raw(pool.read(second)) == raw(made(PAGE, 2))


def test_a_failed_write_loses_nothing_and_is_told_at_the_next_call(
    pool: SpillPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = pool.write(made(PAGE, 1))
    pool.flush()

    def fail(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        bad = pool.write(made(PAGE, 2))
        with pytest.raises(SpillError, match="Input/output error") as told:
            pool.flush()
    assert str(pool.folder) in str(told.value)
    with pytest.raises(SpillError, match="Input/output error"):
        pool.write(made(PAGE, 3))
    assert [raw(pool.read(ticket)) for ticket in (good, bad)] == [raw(made(PAGE, seed)) for seed in (1, 2)]


def test_a_failed_read_ahead_is_told_by_the_read(pool: SpillPool, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = pool.write(made(PAGE))
    pool.flush()

    def fail(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        pool.prefetch(ticket)
        with pytest.raises(SpillError, match="reading in the spill folder"):
            pool.read(ticket)
    assert raw(pool.read(ticket)) == raw(made(PAGE)), "the bytes are still there"


def spill_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("narrowboat-spill")]


def test_threads_begin_with_the_first_write_and_end_with_the_pool(tmp_path: Path) -> None:
    pool = SpillPool(tmp_path, in_flight=MIB)
    assert not spill_threads()
    ticket = pool.write(made(PAGE))
    assert len(spill_threads()) == 1
    pool.start()
    assert len(spill_threads()) == 2
    pool.close()
    pool.close()
    assert not spill_threads()
    for call in (lambda: pool.write(made(PAGE)), lambda: pool.read(ticket), lambda: pool.prefetch(ticket)):
        with pytest.raises(SpillError, match="closed"):
            call()
    pool.release(ticket)


def test_a_pool_that_is_dropped_ends_its_threads_and_its_file(tmp_path: Path) -> None:
    pool = SpillPool(tmp_path, in_flight=MIB)
    ticket: Ticket = pool.write(made(PAGE))
    fd = pool._file._fd
    pool.flush()
    del pool
    gc.collect()
    deadline = time.monotonic() + 10
    while spill_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not spill_threads()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert ticket.nbytes == PAGE


def test_reading_past_a_data_limit_can_be_repeated_without_it(pool: SpillPool) -> None:
    ticket = pool.write(made(32 * MIB))
    pool.flush()
    pool.start()
    with data_limit(8 * MIB) as reason:
        if reason:
            pytest.skip(reason)
        pool.prefetch(ticket)
        with pytest.raises(MemoryError) as told:
            pool.read(ticket)
    assert is_out_of_memory(told.value)
    assert raw(pool.read(ticket)) == raw(made(32 * MIB))


def test_no_operator_is_called_and_storages_are_ordinary(pool: SpillPool) -> None:
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"{func} was called")

    storage, ahead = made(9000), made(9000)
    with torch.inference_mode(), Refuse():
        tickets = [pool.write(storage), pool.write(ahead)]
        pool.flush()
        pool.prefetch(tickets[1])
        read = [pool.read(ticket) for ticket in tickets]
    weight = torch.ones(9000, requires_grad=True)
    for each in read:
        (torch.empty(0, dtype=torch.uint8).set_(each).float() * weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * torch.empty(0, dtype=torch.uint8).set_(storage).float())


def test_calls_from_several_threads_take_turns(tmp_path: Path) -> None:
    with SpillPool(tmp_path, in_flight=8 * PAGE) as pool:

        def work(seed: int) -> bool:
            right = True
            for turn in range(40):
                size = 1 + (seed * 977 + turn * 7919) % (6 * PAGE)
                tickets = [pool.write(made(size, seed + each)) for each in range(3)]
                pool.prefetch(tickets[1])
                right &= all(
                    raw(pool.read(ticket)) == raw(made(size, seed + each)) for each, ticket in enumerate(tickets)
                )
                for ticket in tickets[1:]:
                    pool.release(ticket)
            return right

        running = [in_thread(lambda seed=seed: work(seed)) for seed in range(4)]  # type: ignore[misc]
        for thread, _ in running:
            thread.join(60)
        assert [answers for _, answers in running] == [[True]] * 4
        pool.flush()  # a write under way holds its bytes, wanted or not
        assert (pool.spilled_bytes, pool.bytes_in_flight) == (0, 0)


def test_only_memory_of_the_cpu_is_taken(pool: SpillPool) -> None:
    with pytest.raises(SpillError, match="meta"):
        pool.write(torch.empty(8, device="meta").untyped_storage())
