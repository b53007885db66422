"""Which experts stay in memory: rankings that say who leaves first, and the choice among them by recorded routing.

Pure arithmetic. A key is one expert's rows of one weight. Every use needs its key in memory, whatever the policy
thinks of it; a policy says only who leaves when another comes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from heapq import heapify, heappop, heappush
from math import exp, log, log1p

from narrowboat.plan.result import Plan

Key = int
_WORTH = 1.02  # another policy has to hit this much more bytes before the one in force gives way


class Policy(Enum):
    """Who leaves first."""

    LRU = "lru"  # whose last use is longest ago
    LFU = "lfu"  # who was used least, a use counting half after each half-life
    STATIC = "static"  # who was used least up to the last choice; the ranking stands until the next one


class Ranking:
    """Orders the keys in memory by who leaves first.

    Args:
        policy: by what.
        half_life: uses (of any key) after which a use counts half; for ``LFU``.
        standing: uses counted so far; for ``STATIC``.
    """

    def __init__(self, policy: Policy, *, half_life: float, standing: Mapping[Key, int] | None = None) -> None:
        self.policy = policy
        self._step = log(2) / max(half_life, 1.0)
        self._standing = dict(standing or {})
        self._clock = 0
        self._score: dict[Key, float] = {}
        self._members: set[Key] = set()
        self._heap: list[tuple[float, Key]] = []

    def use(self, key: Key) -> None:
        """Note a use of ``key``, in memory or not."""
        self._clock += 1
        if self.policy is Policy.STATIC:
            return
        if self.policy is Policy.LRU:
            score = float(self._clock)
        else:
            # Forward decay (Cormode et al. 2009): a later use weighs more, so that no score ever has to be renewed.
            # Kept as a logarithm, which does not overflow.
            now = self._clock * self._step
            before = self._score.get(key)
            score = now if before is None else now + log1p(exp(before - now))
        self._score[key] = score
        if key in self._members:
            self._push(key)

    def add(self, key: Key) -> None:
        """``key`` is in memory now."""
        self._members.add(key)
        self._push(key)

    def remove(self, key: Key) -> None:
        """``key`` is out."""
        self._members.discard(key)

    def leaving(self, kept: Container[Key], below: Key | None = None) -> Key | None:
        """Who leaves first of the keys in memory but for ``kept``; None if nobody can. Nothing is removed.

        Args:
            kept: keys that stay.
            below: if given, only those leave that rank below this one.
        """
        aside: list[tuple[float, Key]] = []
        found: Key | None = None
        while self._heap:
            score, key = self._heap[0]
            if key not in self._members or score != self._of(key):
                heappop(self._heap)  # out, or used since
            elif key in kept:
                aside.append(heappop(self._heap))
            else:
                found = key if below is None or (score, key) < (self._of(below), below) else None
                break
        for entry in aside:
            heappush(self._heap, entry)
        return found

    def _of(self, key: Key) -> float:
        if self.policy is Policy.STATIC:
            return float(self._standing.get(key, 0))
        return self._score.get(key, 0.0)

    def _push(self, key: Key) -> None:
        # Among equals the smaller key leaves: a scan over more than fits keeps its end, and hits there.
        heappush(self._heap, (self._of(key), key))
        if len(self._heap) > 8 * len(self._members) + 64:
            self._heap = [(self._of(member), member) for member in self._members]
            heapify(self._heap)


def simulate(
    uses: Sequence[Key], sizes: Mapping[Key, int], capacity: int, policy: Policy, *, half_life: float
) -> tuple[int, int]:
    """Bytes that a cache of ``capacity`` bytes would have had, and would not, over the second half of ``uses``.

    The first half fills the cache, and is all that ``STATIC`` knows of.
    """
    half = len(uses) // 2
    ranking = Ranking(policy, half_life=half_life, standing=Counter(uses[:half]))
    inside: set[Key] = set()
    held = hit = missed = 0
    for at, key in enumerate(uses):
        size = sizes[key]
        if key in inside:
            hit += size if at >= half else 0
        else:
            missed += size if at >= half else 0
            while held + size > capacity:
                other = ranking.leaving(())
                if other is None:
                    break
                ranking.remove(other)
                inside.discard(other)
                held -= sizes[other]
            inside.add(key)
            held += size
            ranking.add(key)
        ranking.use(key)
    return hit, missed


def choose(
    uses: Sequence[Key], sizes: Mapping[Key, int], capacity: int, present: Policy, *, half_life: float
) -> tuple[Policy, dict[Policy, float]]:
    """The policy that would have hit most, and the share of bytes that each would have hit.

    Args:
        uses: recorded routing, oldest first.
        sizes: bytes of each key.
        capacity: bytes of the cache.
        present: the policy in force; stays unless another is clearly better.
        half_life: see ``Ranking``.
    """
    hits: dict[Policy, int] = {}
    total = 0
    for policy in Policy:
        hits[policy], missed = simulate(uses, sizes, capacity, policy, half_life=half_life)
        total = hits[policy] + missed
    best = max(Policy, key=lambda policy: hits[policy])
    if hits[best] <= hits[present] * _WORTH:
        best = present
    return best, {policy: hits[policy] / total if total else 0.0 for policy in Policy}


def replay(ranking: Ranking, uses: Iterable[Key], members: Iterable[Key]) -> Ranking:
    """``ranking`` as if it had been in force during ``uses``, with ``members`` in memory now."""
    for key in uses:
        ranking.use(key)
    for key in members:
        ranking.add(key)
    return ranking


def give_rest(plan: Plan, floor: int, total: int) -> Plan:
    """The plan with the bytes it leaves free given to the experts.

    Ordinary weights come first: every pass reads each of them, and of the experts only those chosen.

    Args:
        plan: made with ``floor`` bytes for experts among its fixed parts.
        floor: bytes that the plan has set aside for experts already.
        total: bytes of all experts; more is of no use.
    """
    rest = max(plan.budget - plan.fixed_bytes - plan.arena_bytes, 0)
    more = min(rest, max(total - floor, 0))
    parts = tuple((name, nbytes + more if name == "experts" else nbytes) for name, nbytes in plan.fixed_parts)
    return replace(plan, fixed_bytes=plan.fixed_bytes + more, fixed_parts=parts, expert_bytes=floor + more)


def miss_seconds(plan: Plan, total: int, demand: int) -> float:
    """Seconds per pass of reading experts, if all of them are wanted equally often.

    Args:
        plan: with the cache's bytes in it.
        total: bytes of all experts.
        demand: bytes of those that one pass wants.
    """
    return demand * max(1 - plan.expert_bytes / max(total, 1), 0.0) / plan.machine.bandwidth
