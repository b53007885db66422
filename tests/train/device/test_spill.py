"""Storages of a device come back bit for bit from pinned memory and from storage, and everything is in order."""

from __future__ import annotations

import gc
import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.arena.device.lanes import CopyLane, LaneEvent
from narrowboat.errors import DeviceError, PinnedMemoryError, SpillError
from narrowboat.train.device.spill import DeviceSpillPool
from narrowboat.train.spill import SpillPool
from narrowboat.train.spill_file import SpillFile
from narrowboat.train.spill_slots import PAGE
from spill_kit import made, raw

MIB = 1 << 20


@pytest.mark.parametrize("behind", [False, True], ids=["pinned", "storage"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3 * PAGE), st.booleans()), max_size=12),
    pages=st.integers(1, 12),
    told=st.booleans(),
    in_flight=st.sampled_from([0, PAGE, 1 << 20]),
    seed=st.integers(0, 99),
)
def test_whatever_is_written_comes_back(
    make_device: Any,
    make_pool: Any,
    behind: bool,
    sizes: list[tuple[int, bool]],
    pages: int,
    told: bool,
    in_flight: int,
    seed: int,
) -> None:
    device = make_device(jitter=seed)
    want = [raw(made(nbytes, number)) for number, (nbytes, _) in enumerate(sizes)]
    with make_pool(device, pages * PAGE, behind=behind, in_flight=in_flight) as pool:
        if told and behind:
            pool.ensure(sum(nbytes for nbytes, _ in sizes))
        for _ in range(2):
            tickets = [pool.write(made(nbytes, number)) for number, (nbytes, _) in enumerate(sizes)]
            for ticket, (_, ahead) in zip(tickets, sizes, strict=True):
                if ahead:
                    pool.prefetch(ticket)
            for ticket, bits in reversed(list(zip(tickets, want, strict=True))):
                storage = pool.read(ticket)
                device.synchronize()  # only for the test, which looks at the bytes from the host
                assert raw(storage) == bits
                pool.release(ticket)
            del tickets
            pool.rest()
            assert (pool.bytes_in_slots, pool.bytes_in_flight) == (0, 0)
        assert pool.pinned_bytes <= pages * PAGE
    assert device.pinned_bytes == 0


# -- room ------------------------------------------------------------------------------------------------------------


def test_without_storage_what_has_no_room_stays_on_the_device(device: Any, make_pool: Any) -> None:
    with make_pool(device, 2 * PAGE) as pool:
        given = [made(PAGE, seed) for seed in range(4)]
        tickets = [pool.write(storage) for storage in given]
        pool.rest()
        back = [pool.read(ticket) for ticket in tickets]
        device.synchronize()
        assert [raw(storage) for storage in back] == [raw(made(PAGE, seed)) for seed in range(4)]
        assert [a is b for a, b in zip(given, back, strict=True)] == [False, False, True, True]
        assert (pool.bytes_in_slots, pool.bytes_offloaded) == (2 * PAGE, 2 * PAGE)


def test_the_device_holds_no_more_than_is_in_flight(device: Any, make_pool: Any) -> None:
    with make_pool(device, 64 * PAGE, in_flight=3 * PAGE) as pool:
        pool.ensure(32 * PAGE)
        tickets = []
        for seed, pages in enumerate((1, 2, 1, 5, 1, 1, 3, 2)):
            tickets.append(pool.write(made(pages * PAGE, seed)))
            assert pool.bytes_in_flight <= 3 * PAGE
        pool.rest()
        assert pool.bytes_in_flight == 0
        assert [pool.prefetch(ticket) for ticket in tickets] == [True, True, *[False] * 6]
        assert pool.bytes_in_flight == 3 * PAGE
        pool.read(tickets[1])
        assert pool.bytes_in_flight == PAGE
        del tickets[0]
        pool.rest()
        assert pool.bytes_in_flight == 0


def test_only_what_is_asked_for_is_pinned_and_it_grows(device: Any, make_pool: Any) -> None:
    with make_pool(device, 64 << 20) as pool:
        assert device.pinned_bytes == 0
        pool.ensure(8 << 20)
        first = device.pinned_bytes
        assert (8 << 20) < first < (10 << 20)
        pool.ensure(1 << 20)
        assert device.pinned_bytes == first
        pool.ensure(32 << 20)
        assert (32 << 20) < device.pinned_bytes == pool.pinned_bytes < (36 << 20)
    assert device.pinned_bytes == 0


def test_refusals(make_device: Any, make_pool: Any) -> None:
    device = make_device(pinnable=1 << 20)
    with make_pool(device, 64 << 20) as pool:
        with pytest.raises(PinnedMemoryError, match="lower the budget for cpu"):
            pool.ensure(2 << 20)
        with pytest.raises(SpillError, match="only memory of cpu"):
            pool.write(torch.empty(1, device="meta").untyped_storage())
    with make_pool(device, 64 * PAGE) as pool:
        with pytest.raises(SpillError, match=r"do not fit into 256 KiB of pinned host memory.*give a folder"):
            pool.ensure(64 * PAGE)
        ticket = pool.write(made(PAGE))
        pool.release(ticket)
        pool.release(ticket)
        with pytest.raises(SpillError, match="after it was released"):
            pool.read(ticket)
        kept = pool.write(made(PAGE))
    with pytest.raises(SpillError, match="closed"):
        pool.read(kept)
    with pytest.raises(SpillError, match="closed"):
        pool.write(made(PAGE))
    pool.release(kept)
    pool.close()


def test_storage_that_fails_is_told_when_it_is_needed_and_loses_nothing(
    device: Any, make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SpillError("writing failed: No space left on device")

    with make_pool(device, 4 * PAGE, behind=True) as pool:
        pool.ensure(8 * PAGE)
        monkeypatch.setattr(SpillFile, "write", full)
        tickets = [pool.write(made(PAGE, seed)) for seed in range(4)]
        with pytest.raises(SpillError, match="No space left"):
            pool.write(made(PAGE))
        pool.rest()
        for seed, ticket in enumerate(tickets):
            storage = pool.read(ticket)
            device.synchronize()
            assert raw(storage) == raw(made(PAGE, seed))
        tickets.clear()
        with pytest.raises(SpillError, match="No space left"):
            pool.ensure(8 * PAGE)
        pool.ensure(2 * PAGE)
        again = pool.write(made(PAGE))
        pool.rest()
        assert raw(pool.read(again)) == raw(made(PAGE))


def test_what_comes_first_goes_on_to_storage_early_and_no_more_than_has_to(device: Any, make_pool: Any) -> None:
    with make_pool(device, 17 * PAGE, behind=True) as pool:
        pool.ensure(24 * PAGE)  # of the room, 16 pages are counted on
        tickets = [pool.write(made(PAGE, seed)) for seed in range(24)]
        pool.rest()
        assert pool.bytes_written == 8 * PAGE
        assert pool.bytes_in_slots == 16 * PAGE
        assert pool.seconds_waiting == 0 or pool.seconds_waiting < 5
        for ticket in reversed(tickets):
            pool.prefetch(ticket)
        for seed, ticket in reversed(list(enumerate(tickets))):
            storage = pool.read(ticket)
            device.synchronize()
            assert raw(storage) == raw(made(PAGE, seed))


def test_the_host_waits_for_nothing_that_is_not_done(
    make_device: Any, make_pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = make_device(bandwidth=100 * PAGE)  # ten milliseconds a page
    waits = []

    def wait(event: LaneEvent) -> None:
        if not event.done():
            waits.append(event)
        real_wait(event)

    def synchronize(lane: CopyLane) -> None:
        waits.append(lane)
        real_synchronize(lane)

    real_wait, real_synchronize = LaneEvent.wait, CopyLane.synchronize
    with make_pool(device, 64 * PAGE, in_flight=64 * PAGE) as pool:
        pool.ensure(16 * PAGE)
        monkeypatch.setattr(LaneEvent, "wait", wait)
        monkeypatch.setattr(CopyLane, "synchronize", synchronize)
        begin = time.perf_counter()
        tickets = [pool.write(made(PAGE, seed)) for seed in range(8)]
        assert time.perf_counter() - begin < 0.04
        time.sleep(0.2)  # they are out by now
        for ticket in tickets:
            assert pool.prefetch(ticket)
        assert device.copied_out == device.copied_in == 8 * PAGE
        del ticket
        tickets.clear()
        gc.collect()
        assert pool.bytes_in_slots == 0 and not waits


def test_threads_at_once(make_device: Any, make_pool: Any) -> None:
    device = make_device(jitter=5)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        held: list[tuple[Any, int]] = []
        for number in range(80):
            if held and rng.random() < 0.5:
                ticket, which = held.pop(rng.randrange(len(held)) if rng.random() < 0.3 else -1)
                if rng.random() < 0.5:
                    pool.prefetch(ticket)
                if rng.random() < 0.9:
                    storage = pool.read(ticket)
                    device.synchronize()
                    assert raw(storage) == raw(made(PAGE, which))
            else:
                which = 100 * seed + number
                held.append((pool.write(made(PAGE, which)), which))

    with make_pool(device, 7 * PAGE, behind=True, in_flight=4 * PAGE) as pool, ThreadPoolExecutor(3) as threads:
        pool.ensure(20 * PAGE)
        for done in [threads.submit(work, seed) for seed in range(3)]:
            done.result()
        pool.rest()
        assert (pool.bytes_in_slots, pool.bytes_in_flight) == (0, 0)


# -- order -----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What a scenario needs.

    Attributes:
        device, stranger: whose threads share a stream, and whose threads have their own.
        pool_type: perhaps without a wait.
    """

    device: Any
    stranger: EmulatedDevice
    watch: Any
    folder: Path
    pool_type: type[DeviceSpillPool] = DeviceSpillPool

    @contextmanager
    def pool(self, pages: int, in_flight: int, device: Any = None) -> Iterator[DeviceSpillPool]:
        behind = SpillPool(self.folder, in_flight=1 << 20)
        with self.pool_type(device or self.device, pages * PAGE, behind, in_flight=in_flight * PAGE) as pool:
            yield pool

    def kernels(self, x: torch.Tensor, count: int = 1) -> torch.Tensor:
        """Kernels over a page, with temporaries in memory that is free again afterwards."""
        with self.watch(self.device):
            for _ in range(count):
                x = torch.sin(x * 1.5) + 1
        return x


def over(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0).set_(storage)


def passes(bench: Bench) -> None:
    """Results of kernels are spilled, most of them go on to storage, and come back in order."""
    with bench.pool(6, 3) as pool:
        for number in range(3):
            count = (16, 4, 9)[number]
            pool.ensure(count * PAGE)
            x, tickets, want = torch.full((PAGE // 4,), float(number)), [], []
            for _ in range(count):
                x = bench.kernels(x)
                tickets.append(pool.write(x.untyped_storage()))
                want.append(float(x.sum()))
                bench.kernels(x)
            while tickets:
                for ticket in tickets[-3:]:
                    pool.prefetch(ticket)
                x = over(pool.read(tickets.pop()))
                bench.kernels(x)
                assert float(x.sum()) == want.pop()
                del x


def asked_for_in_another_order(bench: Bench) -> None:
    """What is read ahead from storage is released, or asked for long after."""
    with bench.pool(6, 4) as pool:
        pool.ensure(12 * PAGE)
        x, tickets = torch.ones(PAGE // 4), []
        for _ in range(12):
            x = bench.kernels(x)
            tickets.append(pool.write(x.untyped_storage()))
        pool.rest()
        for ticket in tickets[:3]:
            assert pool.prefetch(ticket)
        del tickets[1]
        for ticket in (tickets[1], tickets[0], tickets[-1]):
            bench.kernels(over(pool.read(ticket)))


def read_ahead_for_nothing(bench: Bench) -> None:
    """A slot is given anew that is being copied in from, for a storage which nobody waited for."""
    slow = replace(bench, device=type(bench.device)(bandwidth=10 * PAGE))
    with slow.pool(1, 1) as pool:
        x = slow.kernels(torch.ones(PAGE // 4))
        ticket = pool.write(x.untyped_storage())
        pool.rest()
        assert pool.prefetch(ticket)
        pool.release(ticket)
        pool.write(slow.kernels(x).untyped_storage())


def memory_of_a_last_tenant(bench: Bench) -> None:
    """What comes back lies where a kernel's result just was, as torch's allocators have it."""
    with bench.pool(8, 8) as pool, pytest.MonkeyPatch.context() as patch:
        pool.ensure(8 * PAGE)
        x = bench.kernels(torch.ones(PAGE // 4))
        ticket = pool.write(x.clone().untyped_storage())
        pool.rest()
        tenant = bench.kernels(x).untyped_storage()
        patch.setattr(pool, "_fresh", lambda nbytes: tenant)
        bench.kernels(over(pool.read(ticket)))


def two_streams(bench: Bench) -> None:
    """Written on one thread's stream, read on another's, neither of which knows of the other."""
    with bench.pool(2, 0, bench.stranger) as pool, ThreadPoolExecutor(1) as thread:
        pool.ensure(2 * PAGE)
        ticket = thread.submit(pool.write, made(PAGE)).result()
        storage = pool.read(ticket)
        bench.stranger.kernel_reads(storage.data_ptr(), PAGE)


SCENARIOS = [passes, asked_for_in_another_order, read_ahead_for_nothing, memory_of_a_last_tenant, two_streams]
WAITS = {
    "a copy out waits for the kernels that made the storage": "self._out.wait(stream.record())",
    "a copy out waits for the last copy in from its slot": "self._out.wait(self._last_in)",
    "a copy in waits for the kernels of the memory's last tenant": "self._in.wait(ready)",
    "a copy in waits for the copy out to its slot": "self._in.wait(place.out)",
    "kernels wait for the copy in": "self._device.compute().wait(arriving.event)",
    "what takes the memory of a storage that left waits for its copy": "leaving.stream.wait(leaving.event)",
    "the mover waits for the copy out": "place.out.wait()",
    "a copy out comes after the threads": "self._device.take_over(known)",
    "the thread that reads waits for both streams": "event.wait()",
}


@pytest.fixture
def bench(make_device: Any, watch: Any, tmp_path: Path) -> Bench:
    return Bench(make_device(jitter=1), EmulatedDevice(jitter=2), watch, tmp_path)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_everything_is_in_order(bench: Bench, scenario: Callable[[Bench], None]) -> None:
    scenario(bench)
    assert bench.device.pinned_bytes == bench.stranger.pinned_bytes == 0


@pytest.mark.parametrize("line", WAITS.values(), ids=WAITS)
def test_without_a_wait_order_is_not_proved(bench: Bench, line: str, without: Any) -> None:
    bench.pool_type = without(line)
    caught = []
    for scenario in SCENARIOS:
        try:
            scenario(replace(bench, device=type(bench.device)(jitter=1), stranger=EmulatedDevice()))
        except (DeviceError, SpillError) as error:
            assert re.search("used before ready|in use", str(error))
            caught.append(f"{scenario.__name__}: {error}")
    assert caught
