"""The routing as it was recorded, and the policy that it chooses."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from narrowboat.plan.experts import Policy, Ranking, choose, replay

_RECORDED = 16384  # uses that are kept; once there are so many, the policy is chosen anew after as many more
_FIRST = 512  # uses after which it is chosen for the first time, and from then on after twice as many each time


class Routing:
    """Which experts were used, and by that who leaves first.

    Args:
        sizes: bytes by key of every expert's weight.

    Attributes:
        ranking: of the keys in memory.
        policy: by which it ranks.
    """

    def __init__(self, sizes: Mapping[int, int]) -> None:
        self._sizes = sizes
        self._tally = [0] * len(sizes)
        self._uses: deque[int] = deque(maxlen=_RECORDED)
        self._since, self._after = 0, _FIRST
        self._half_life = 4.0 * len(sizes)  # some four uses of each, if all are used alike
        self.policy = Policy.LRU
        self.ranking = self._rank(())

    def use(self, key: int) -> None:
        """Note a use."""
        self._tally[key] += 1
        self._uses.append(key)
        self._since += 1
        self.ranking.use(key)

    @property
    def due(self) -> bool:
        """Whether enough has been recorded since the last choice."""
        return self._since >= self._after

    def choose(self, capacity: int, inside: Iterable[int]) -> dict[Policy, float]:
        """Put the policy in force that would have hit most of what was recorded.

        Args:
            capacity: bytes of the cache.
            inside: keys in memory.

        Returns:
            By policy, the share of bytes that it would have hit.
        """
        self._since, self._after = 0, min(2 * self._after, _RECORDED)
        self.policy, shares = choose(list(self._uses), self._sizes, capacity, self.policy, half_life=self._half_life)
        self.ranking = self._rank(inside)
        self._tally = [count // 2 for count in self._tally]  # what was long ago counts less and less
        return shares

    def _rank(self, inside: Iterable[int]) -> Ranking:
        standing = {key: count for key, count in enumerate(self._tally) if count}
        ranking = Ranking(self.policy, half_life=self._half_life, standing=standing)
        return replay(ranking, self._uses, inside)
