"""A pool of pages grows and shrinks; what is lent stays where it is."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest

from narrowboat.arena.pool import PagePool, PooledSlab
from narrowboat.errors import StorageError

PAGE = 4096


def held(pool: PagePool) -> int:
    """Bytes of memory behind the file."""
    return os.fstat(pool.fd).st_blocks * 512


def test_it_holds_what_it_was_given_as_it_shrinks_and_grows() -> None:
    pool = PagePool(64 * PAGE)
    for pages in (64, 10, 40, 0, 100, 30):
        pool.resize(pages * PAGE)
        assert (pool.nbytes, pool.free_bytes, held(pool)) == (pages * PAGE,) * 3
    pool.close()


def test_what_is_lent_keeps_its_bytes_and_is_never_taken_back() -> None:
    pool = PagePool(16 * PAGE)
    slab = PooledSlab(4 * PAGE, pool)
    extents = pool.take(4 * PAGE)
    assert extents is not None
    slab.back(0, extents)
    slab.bytes_at(0, 4 * PAGE)[:] = bytes(range(256)) * (4 * PAGE // 256)
    with pytest.raises(StorageError, match="in use"):
        pool.resize(3 * PAGE)
    assert pool.nbytes == 16 * PAGE and pool.free_bytes == 12 * PAGE
    pool.resize(4 * PAGE)
    pool.resize(40 * PAGE)
    assert bytes(slab.bytes_at(0, 4 * PAGE)) == bytes(range(256)) * (4 * PAGE // 256)
    taken = pool.take(36 * PAGE)
    assert taken is not None and pool.take(PAGE) is None
    places = sorted([*extents, *taken])
    assert all(a + n <= b for (a, n), (b, _) in pairwise(places)), "no page is lent twice"
    slab.unback(0, 4 * PAGE)
    pool.give(extents + taken)
    assert pool.free_bytes == 40 * PAGE == held(pool)
    slab.close()
    pool.close()
