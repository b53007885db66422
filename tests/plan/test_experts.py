"""Which experts stay in memory: rankings, their simulation, and the choice among them."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowboat.plan.experts import Policy, Ranking, choose, replay, simulate

USES = st.lists(st.integers(0, 9), max_size=120)


def belady(uses: list[int], capacity: int) -> int:
    """Hits in the second half of the cache that knows the future, for keys of one byte: no policy hits more."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for at, key in enumerate(uses):
        after: dict[frozenset[int], int] = {}
        for inside, hits in best.items():
            now = hits + (key in inside and at >= len(uses) // 2)
            grown = inside | {key}
            options = [grown] if len(grown) <= capacity else [grown - {other} for other in inside if other != key]
            for option in options:
                after[option] = max(after.get(option, 0), now)
        best = after
    return max(best.values())


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 4), st.sampled_from(Policy))
@settings(max_examples=60, deadline=None)
def test_no_policy_hits_more_than_every_future_tried(uses: list[int], capacity: int, policy: Policy) -> None:
    hit, missed = simulate(uses, dict.fromkeys(range(6), 1), capacity, policy, half_life=8)
    assert 0 <= hit <= belady(uses, capacity)
    assert hit + missed == len(uses) - len(uses) // 2


@given(USES, st.integers(1, 10))
def test_lru_is_the_textbook_one(uses: list[int], capacity: int) -> None:
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for at, key in enumerate(uses):
        hits += key in cache and at >= len(uses) // 2
        cache[key] = None
        cache.move_to_end(key)
        if len(cache) > capacity:
            cache.popitem(last=False)
    assert simulate(uses, dict.fromkeys(range(10), 1), capacity, Policy.LRU, half_life=1)[0] == hits


@given(USES, st.integers(1, 9), st.floats(2, 50))
def test_lfu_ranks_by_uses_that_halve_with_age(uses: list[int], capacity: int, half_life: float) -> None:
    ranking = replay(Ranking(Policy.LFU, half_life=half_life), uses, range(10))
    weight = dict.fromkeys(range(10), 0.0)
    for at, key in enumerate(uses):
        weight[key] += 2.0 ** ((at - len(uses)) / half_life)
    used = set(uses)
    first = ranking.leaving(())
    assert first is not None
    if used == set(range(10)):
        assert weight[first] == pytest.approx(min(weight.values()))
    else:
        assert first not in used


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=200), st.sampled_from(Policy))
def test_who_leaves_is_always_in_memory_and_not_kept(steps: list[tuple[int, int]], policy: Policy) -> None:
    ranking = Ranking(policy, half_life=5, standing={3: 2, 4: 7})
    inside: set[int] = set()
    for what, key in steps:
        if what == 0:
            ranking.use(key)
        elif what == 1 and key not in inside:
            inside.add(key)
            ranking.add(key)
        else:
            kept = {key, key + 1}
            leaving = ranking.leaving(kept)
            assert (leaving is None) == (not inside - kept)
            if leaving is not None:
                assert leaving in inside - kept
                inside.remove(leaving)
                ranking.remove(leaving)


def test_sizes_count_in_bytes() -> None:
    sizes = {0: 10, 1: 1, 2: 1}
    assert simulate([1, 2, 1, 2], sizes, 2, Policy.LRU, half_life=1) == (2, 0)
    assert simulate([0, 1, 0, 1], sizes, 11, Policy.LRU, half_life=1) == (11, 0)
    assert simulate([0, 1, 0, 1], sizes, 10, Policy.LRU, half_life=1) == (0, 11)


def test_a_scan_over_more_than_fits_is_given_to_the_static_ranking() -> None:
    chosen, shares = choose(list(range(10)) * 20, dict.fromkeys(range(10), 1), 5, Policy.LRU, half_life=40)
    assert chosen is Policy.STATIC
    assert shares[Policy.LRU] == 0 and shares[Policy.STATIC] >= 0.4


def test_routing_that_drifts_is_given_to_recency() -> None:
    uses = [block * 3 + i for block in range(30) for _ in range(10) for i in range(3)]
    chosen, shares = choose(uses, dict.fromkeys(range(90), 1), 4, Policy.STATIC, half_life=360)
    assert chosen is not Policy.STATIC and shares[chosen] > 0.8


def test_a_lasting_preference_is_not_given_to_recency() -> None:
    draw = random.Random(3)
    keys, weights = list(range(64)), [1 / (i + 1) for i in range(64)]
    uses = draw.choices(keys, weights, k=4000)
    chosen, shares = choose(uses, dict.fromkeys(keys, 1), 12, Policy.LRU, half_life=256)
    assert chosen is not Policy.LRU and shares[chosen] > shares[Policy.LRU] * 1.02


def test_the_policy_in_force_stays_among_equals() -> None:
    for present in Policy:
        assert choose([1, 1, 1, 1], {1: 5}, 5, present, half_life=4)[0] is present
        assert choose([], {}, 5, present, half_life=4) == (present, dict.fromkeys(Policy, 0.0))
