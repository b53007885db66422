"""Pages that move between fixed addresses, and who holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.arena.pool import PagePool, PooledSlab
from narrowboat.errors import BudgetError
from narrowboat.machine.memory import resident_bytes
from narrowboat.tasks.execute.space import Place, SwapSpace

PAGE = 4096
MIB = 1 << 20


def test_a_tensor_keeps_its_address_while_its_pages_come_and_go() -> None:
    pool = PagePool(2 * MIB)
    slab = PooledSlab(16 * MIB, pool)
    view = slab.tensor(8 * MIB, torch.float32, (MIB // 4,))
    address = view.data_ptr()
    extents = pool.take(MIB)
    assert extents is not None
    slab.back(8 * MIB, extents)
    view.fill_(3)
    assert (view.data_ptr(), float(view.sum())) == (address, 3 * MIB / 4)
    slab.unback(8 * MIB, MIB)
    assert float(view.sum()) == 0
    slab.back(8 * MIB, extents)
    assert float(view.sum()) == 3 * MIB / 4  # the page is the same one
    del view
    slab.close()
    pool.close()


def test_what_is_mapped_is_never_more_than_the_pool() -> None:
    pool = PagePool(32 * MIB)
    slab = PooledSlab(512 * MIB, pool)
    zeros = bytes(MIB)  # whatever malloc keeps of larger objects would be counted below
    before = resident_bytes()
    for at in range(0, 512 * MIB, 32 * MIB):
        extents = pool.take(32 * MIB)
        assert extents is not None
        slab.back(at, extents)
        for piece in range(at, at + 32 * MIB, MIB):
            slab.bytes_at(piece, MIB)[:] = zeros
        assert resident_bytes() - before < 34 * MIB
        slab.unback(at, 32 * MIB)
        pool.give(extents)
    assert resident_bytes() - before < 2 * MIB
    slab.close()
    pool.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_extents_never_overlap_and_nothing_is_lost(sizes: list[int], random: object) -> None:
    pool = PagePool(20 * PAGE)
    lent: list[list[tuple[int, int]]] = []
    for size in sizes:
        extents = pool.take(size * PAGE)
        if extents is None:
            assert pool.free_bytes < size * PAGE
            pool.give(lent.pop(random.randrange(len(lent))))  # type: ignore[attr-defined]
            continue
        lent.append(extents)
        pages = [at + k for each in lent for at, n in each for k in range(0, n, PAGE)]
        assert len(pages) == len(set(pages)) and max(pages) < 20 * PAGE
        assert pool.free_bytes == (20 - len(pages)) * PAGE
    pool.close()


def places(pool: PagePool, *sizes: int) -> list[Place]:
    slab = PooledSlab(sum(sizes) * PAGE, pool)
    made, at = [], 0
    for size in sizes:
        made.append(Place(f"b{at}", slab, at * PAGE, size * PAGE))
        at += size
    return made


def test_a_block_let_go_is_found_again_until_its_pages_are_wanted() -> None:
    pool = PagePool(10 * PAGE)
    space = SwapSpace(pool)
    first, second, third = places(pool, 4, 4, 5)
    for place in (first, second):
        assert not space.hold(place)
        place.valid = True
        space.let_go(place)
    assert space.hold(first)  # still there
    assert not space.hold(third)  # takes the other's pages
    assert second.extents is None
    assert (space.in_use, space.free_bytes) == (9 * PAGE, PAGE)
    with pytest.raises(BudgetError, match="does not fit beside"):
        space.hold(second)
    assert space.hits == 1
    pool.close()


def test_two_users_of_one_block_hold_it_once() -> None:
    pool = PagePool(4 * PAGE)
    space = SwapSpace(pool)
    (only,) = places(pool, 4)
    space.hold(only)
    only.valid = True
    assert space.hold(only) and space.in_use == 4 * PAGE
    space.let_go(only)
    assert only.users == 1
    space.let_go(only)
    assert space.in_use == 0
    forgetful = SwapSpace(pool, remember=False)
    only.extents = None
    pool.give([(0, 4 * PAGE)])
    assert not forgetful.hold(only)
    only.valid = True
    forgetful.let_go(only)
    assert not forgetful.hold(only)
    pool.close()


def test_no_file_is_left_in_shared_memory() -> None:
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.is_dir() else set()
    pool = PagePool(MIB, lock=True)
    assert (set(shared.iterdir()) if shared.is_dir() else set()) == before
    pool.close()


def test_a_pool_that_gives_way_drops_what_nobody_uses_and_never_what_somebody_does() -> None:
    pool = PagePool(64 * MIB)
    slab = PooledSlab(64 * MIB, pool)
    space = SwapSpace(pool)
    space.least = 8 * MIB
    places = [Place(f"block {k}", slab, 8 * MIB * k, 8 * MIB) for k in range(8)]
    for place in places:
        space.hold(place)
        place.valid = True
    for place in places[2:]:
        space.let_go(place)
    space.shrink(0)
    assert pool.nbytes == 64 * MIB, "there is nothing too much"
    space.shrink(20 * MIB)  # and a little more than that, so that it is not a few pages each time
    assert pool.nbytes == 40 * MIB and [place.valid for place in places] == [True] * 2 + [False] * 3 + [True] * 3
    space.shrink(1 << 40)
    assert pool.nbytes == space.in_use == 16 * MIB and all(place.valid for place in places[:2])
    for place in places[:2]:
        space.let_go(place)
    space.shrink(1 << 40)
    assert pool.nbytes == space.least
    space.resize(64 * MIB)
    assert pool.free_bytes == pool.nbytes == 64 * MIB
    slab.close()
    pool.close()
