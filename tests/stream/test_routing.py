"""The routing as recorded: the policy follows it, at first soon and then ever more seldom."""

from __future__ import annotations

import random

from narrowboat.plan.experts import Policy
from narrowboat.stream.routing import Routing


def test_choices_come_due_after_ever_more_uses() -> None:
    routing = Routing(dict.fromkeys(range(8), 1))
    due = []
    for at in range(40_000):
        routing.use(at % 8)
        if routing.due:
            due.append(at + 1)
            routing.choose(4, range(4))
    assert due[:4] == [512, 512 + 1024, 512 + 1024 + 2048, 512 + 1024 + 2048 + 4096]
    assert due[-1] - due[-2] == 16384


def test_the_policy_follows_routing_that_changes_its_kind() -> None:
    draw = random.Random(1)
    routing = Routing(dict.fromkeys(range(64), 1))
    seen = []
    for at in range(34_000):
        # At first everything in turn; from then on a few, that change every hundred uses.
        routing.use(at % 64 if at < 600 else (at // 100 * 7 + draw.randrange(5)) % 64)
        if routing.due:
            shares = routing.choose(16, range(16))
            assert shares[routing.policy] * 1.02 >= max(shares.values())
            seen.append(routing.policy)
    assert seen[0] is Policy.STATIC
    assert seen[-1] is not Policy.STATIC


def test_who_is_in_memory_stays_known_over_a_choice() -> None:
    routing = Routing(dict.fromkeys(range(8), 1))
    for key in range(8):
        routing.use(key)
    routing.choose(4, [5, 2])
    assert routing.ranking.leaving(()) in (2, 5)
    assert routing.ranking.leaving((2, 5)) is None
