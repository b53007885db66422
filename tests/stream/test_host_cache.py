"""The pinned cache of weights: places that do not meet, kept from plan to plan."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.arena.device.emulated import EmulatedDevice
from narrowboat.stream.host_cache import HostCache

PAGE = 4096


@settings(max_examples=200, deadline=None)
@given(
    pages=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    plans=st.lists(st.sets(st.integers(0, 11), max_size=12), min_size=1, max_size=6),
)
def test_places_never_meet_and_what_stays_keeps_its_own(pages: list[int], plans: list[set[int]]) -> None:
    sizes = [n * PAGE for n in pages]
    room = sum(sizes) * 2 // 3 // PAGE * PAGE
    cache = HostCache(EmulatedDevice(), room)
    for wanted in plans:
        fits: list[int] = []
        for i in sorted(w for w in wanted if w < len(sizes)):
            if sum(sizes[j] for j in fits) + sizes[i] <= room:
                fits.append(i)
        before = {i: cache.slot(i) for i in fits}
        cache.arrange(sizes, fits)
        spans = sorted((cache.slot(i).offset, cache.slot(i).offset + sizes[i]) for i in fits)  # type: ignore[union-attr]
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(end <= room for _, end in spans)
        assert cache.held == sum(sizes[i] for i in fits)
        kept = [i for i in fits if before[i] is not None and cache.slot(i) is before[i]]
        # Either everything that was there stays where it is, or holes made all of it move.
        assert not kept or all(cache.slot(i) is before[i] for i in fits if before[i] is not None)
    cache.close()


def test_blocks_of_another_size_do_not_find_what_was_anothers() -> None:
    cache = HostCache(EmulatedDevice(), 8 * PAGE)
    cache.arrange([PAGE, PAGE], {0, 1})
    slot = cache.slot(0)
    assert slot is not None
    slot.filled = True
    cache.arrange([2 * PAGE, PAGE], {0, 1})
    assert cache.slot(0) is not slot
    assert not cache.slot(0).filled  # type: ignore[union-attr]


def test_without_room_there_is_no_memory() -> None:
    device = EmulatedDevice()
    cache = HostCache(device, 100)
    assert cache.slab is None
    assert device.pinned_bytes == 0
    cache.arrange([PAGE], set())
    assert cache.slot(0) is None


def test_memory_that_was_forgotten_is_not_left_pinned() -> None:
    device = EmulatedDevice()
    cache = HostCache(device, 4 * PAGE)
    assert device.pinned_bytes == 4 * PAGE
    del cache
    assert device.pinned_bytes == 0
