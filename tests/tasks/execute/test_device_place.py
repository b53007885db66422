"""A device's memory as tasks use it: chunks, their count, and units that are made of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.errors import DeviceMemoryError, StorageError
from narrowboat.tasks.execute.device_model import in_chunks
from narrowboat.tasks.execute.device_place import ChunkPool, DevicePlace, Tally, Window
from narrowboat.tasks.execute.model import Unit

GRAIN = 4096


def test_what_windows_map_is_counted_together_and_given_back() -> None:
    device, tally = EmulatedDevice(8 * GRAIN, granularity=GRAIN), Tally()
    first, second = (Window(device, 6 * GRAIN, GRAIN, tally) for _ in range(2))
    assert first.back(0) and first.back(5 * GRAIN) and not first.back(0) and second.back(GRAIN)
    assert tally.nbytes == 3 * GRAIN == device.memory()[1] - device.memory()[0]
    assert first.unback(0, 6 * GRAIN) == 2 * GRAIN and first.unback(0, 6 * GRAIN) == 0
    assert (tally.nbytes, tally.most) == (GRAIN, 3 * GRAIN)
    tally.begin_anew()
    second.close()
    assert (tally.nbytes, tally.most, device.memory()[0]) == (0, GRAIN, 8 * GRAIN)
    device.take(8 * GRAIN)
    with pytest.raises(DeviceMemoryError):
        first.back(0)
    assert tally.nbytes == 0


def test_a_larger_chunk_is_mapped_as_one() -> None:
    device, tally = EmulatedDevice(64 * GRAIN, granularity=GRAIN), Tally()
    window = Window(device, 10 * GRAIN, 4 * GRAIN, tally)
    assert window.nbytes == 12 * GRAIN
    assert window.back(4 * GRAIN) and tally.nbytes == 4 * GRAIN
    window.close()


def test_unmapping_waits_for_nobodys_kernels() -> None:
    device = EmulatedDevice(8 * GRAIN, granularity=GRAIN)
    window = Window(device, 8 * GRAIN, GRAIN, Tally())
    device.synchronize = lambda: pytest.fail("waited for other tasks' kernels")  # type: ignore[method-assign]
    window.back(0)
    window.unback(0, GRAIN)
    del device.synchronize
    window.close()


def test_a_pool_counts_whole_chunks() -> None:
    pool = ChunkPool(10 * GRAIN + 17, GRAIN)
    assert pool.nbytes == 10 * GRAIN
    lent = pool.take(6 * GRAIN)
    assert lent is not None and pool.take(5 * GRAIN) is None and pool.free_bytes == 4 * GRAIN
    with pytest.raises(StorageError, match="in use"):
        pool.resize(5 * GRAIN)
    pool.resize(6 * GRAIN)
    assert pool.free_bytes == 0
    pool.give(lent)
    assert pool.free_bytes == pool.nbytes == 6 * GRAIN


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 60), st.integers(0, 60))
def test_parts_of_a_place_are_exactly_what_was_asked_for(sizes: list[int], low: int, high: int) -> None:
    spans, at = [], 0
    for k, size in enumerate(sizes):
        if size:
            spans.append((k, at, at + size * 10))
        at += size * 10 + 10  # what lies between is pinned
    place = DevicePlace("b", None, 0, sum(end - begin for _, begin, end in spans), spans=spans)
    order = [byte for _, begin, end in spans for byte in range(begin, end)]
    found = [byte for _, begin, end in place.part(low, high) for byte in range(begin, end)]
    assert found == order[low:high]
    assert place.out == place.nbytes


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_units_are_whole_chunks_and_none_is_much_smaller_than_a_few(sizes: list[int]) -> None:
    units = [Unit((k,), 10 * k, size * 512) for k, size in enumerate(sizes)]
    made = in_chunks(units, GRAIN)
    assert [n for unit in made for n in unit.groups] == list(range(len(sizes)))
    assert all(unit.nbytes % GRAIN == 0 for unit in made)
    assert [unit.first_step for unit in made] == [10 * unit.groups[0] for unit in made]
    assert len(made) == 1 or all(unit.nbytes >= 4 * GRAIN for unit in made)
    weights = sum(sizes) * 512
    assert weights <= sum(unit.nbytes for unit in made) < weights * 1.25 + GRAIN
