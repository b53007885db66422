"""The guard gives pages back only where they are needed, and never lets a step pass its limit by what it was told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowboat.train.heap_guard import HeapGuard
from narrowboat.train.tape.frames import Takes

MIB = 1 << 20


class Heap:
    """A heap that keeps what is freed: its holes serve nothing, the worst there can be."""

    def __init__(self, base: int) -> None:
        self.live, self.free, self.calls = base, 0, []

    def resident(self) -> int:
        return self.live + self.free

    def give_back(self) -> None:
        self.free = 0
        self.calls.append("give back")

    def open_whole_heap(self) -> bool:
        self.calls.append("open")
        return True

    def map_apart(self) -> None:
        self.free = 0
        self.calls.append("apart")

    @property
    def is_apart(self) -> bool:
        modes = [call for call in self.calls if call != "give back"]
        return bool(modes) and modes[-1] == "apart"


def guard_over(heap: Heap, base: int, budget: int, ceiling: int | None = None) -> HeapGuard:
    return HeapGuard(base, budget, ceiling, heap=heap, resident=heap.resident)


def test_nothing_is_given_back_while_there_is_room() -> None:
    heap = Heap(100 * MIB)
    guard = guard_over(heap, 100 * MIB, 64 * MIB)
    for _ in range(3):
        heap.free += 4 * MIB
        guard.before(Takes(4 * MIB, 4 * MIB))
    assert heap.calls == [] and guard.trims == 0


def test_free_pages_go_back_before_a_kernel_that_needs_the_room() -> None:
    heap = Heap(100 * MIB)
    guard = guard_over(heap, 100 * MIB, 64 * MIB)
    heap.free = 50 * MIB
    guard.before(Takes(20 * MIB, 20 * MIB))
    assert heap.free == 0 and guard.trims == 1


def test_what_a_trim_left_is_not_trimmed_for_again() -> None:
    heap = Heap(100 * MIB)
    guard = guard_over(heap, 100 * MIB, 64 * MIB)
    heap.live += 60 * MIB
    for _ in range(5):
        guard.before(Takes(20 * MIB, 20 * MIB))
    assert guard.trims == 1


def test_blocks_are_mapped_apart_where_there_is_no_room_for_what_a_heap_would_waste() -> None:
    heap = Heap(100 * MIB)
    guard = guard_over(heap, 100 * MIB, 64 * MIB)
    heap.live += 30 * MIB
    guard.before(Takes(20 * MIB, 60 * MIB))
    assert heap.calls[-1] == "apart" and guard.tight == 1
    guard.before(Takes(0, 0))  # another tensor of the same kernel
    assert heap.is_apart
    guard.before(Takes(1 * MIB, 1 * MIB))
    assert not heap.is_apart


def test_a_step_that_would_pass_the_ceiling_is_given_up() -> None:
    heap = Heap(100 * MIB)
    guard = guard_over(heap, 100 * MIB, 64 * MIB, 80 * MIB)
    heap.free = 70 * MIB  # can be given back
    guard.before(Takes(20 * MIB, 20 * MIB))
    heap.live += 70 * MIB
    with pytest.raises(MemoryError, match="out of memory"):
        for _ in range(3):  # it looks when what it was told would fill the room that it saw last
            guard.before(Takes(20 * MIB, 20 * MIB))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)), max_size=60))
def test_resident_memory_stays_within_the_budget_whenever_live_memory_does(kernels) -> None:
    """Kernels of (results, scratch, what is let go afterwards) MiB, in a heap that never uses a hole again."""
    base, budget = 100 * MIB, 80 * MIB
    heap = Heap(base)
    guard = guard_over(heap, base, budget)
    usable = budget - 5 * MIB  # the guard's own spare bytes
    for results, scratch, dropped in kernels:
        highest, turnover = (results + scratch) * MIB, (results + 2 * scratch) * MIB
        if heap.live - base + highest > usable:
            continue  # no plan would have this
        guard.before(Takes(highest, turnover))
        if heap.is_apart:
            assert heap.resident() + highest <= base + budget
        else:
            heap.free += turnover - results * MIB
        heap.live += results * MIB
        assert heap.resident() <= base + budget
        gone = min(dropped * MIB, heap.live - base)
        heap.live -= gone
        heap.free += gone
