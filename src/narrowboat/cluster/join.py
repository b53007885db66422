"""How a node comes in: its executor starts, its versions are compared, its way is measured, its costs are learned."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from narrowboat.cluster.facts import differing, versions
from narrowboat.cluster.ingress import allowance
from narrowboat.cluster.link import Cluster
from narrowboat.cluster.member import Member
from narrowboat.cluster.settings import Pace
from narrowboat.errors import ClusterError, NarrowboatError, NodeLostError

_ECHOES = 30
_WARM = 5  # of them first, that are not counted: connections are made
_PAYLOAD = 64 << 10  # bytes, of requests and answers whose size is not known yet
_AGAIN = 0.5  # seconds


class Joining:
    """Brings nodes in.

    Args:
        cluster: that they belong to.
        pace: how long they may take.
    """

    def __init__(self, cluster: Cluster, pace: Pace) -> None:
        self._cluster, self._pace = cluster, pace
        self._of_host: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def open(self, member: Member) -> None:
        """Its executor is there and says who it is; or the member is refused, with the reason."""
        try:
            if member.link is None:
                member.link = await self._cluster.open(member.machine, self._pace.lease)
            member.about = await asyncio.wait_for(self._first_word(member), self._pace.start)
            member.answers()
        except TimeoutError:
            self._refuse(member, f"its executor did not start within {self._pace.start:g} s", again=True)
        except NarrowboatError as error:
            self._refuse(member, str(error), again=_unreached(error))
        else:
            here = versions()
            differs = differing(
                {k: v for k, v in here.items() if k in ("narrowboat", "python", "torch")}, member.about["versions"]
            )
            if differs:
                member.becomes("refused", f"its versions differ from the ingress: {differs}; install the same")

    def _refuse(self, member: Member, said: str, *, again: bool) -> None:
        """A node that is no use; one that was only not reached is tried again as long as the cluster names it."""
        if member.state == "lost":  # it has left the cluster meanwhile
            return
        member.becomes("refused", said)
        member.tasks = ()  # nobody asks it any more: its lease ends, and what it ran may go elsewhere
        if again:
            member.retry = time.monotonic() + self._pace.lost

    async def _first_word(self, member: Member) -> dict[str, Any]:
        assert member.link is not None
        while True:
            try:
                told: dict[str, Any] = await member.link.call("about")
                return told
            except NodeLostError:
                # Ray Serve is still placing it, or the process of an ingress before us still holds its memory.
                if member.gone.is_set():
                    raise
                await asyncio.sleep(_AGAIN)

    async def way(self, member: Member) -> int:
        """Microseconds that the way there and back has to be allowed."""
        assert member.link is not None
        taken = []
        for number in range(_WARM + _ECHOES):
            began = time.perf_counter()
            await asyncio.wait_for(member.link.call("echo", bytes(_PAYLOAD), _PAYLOAD), self._pace.lost)
            if number >= _WARM:
                taken.append(time.perf_counter() - began)
        member.answers()
        return allowance(taken)

    async def learn(self, member: Member, description: Mapping[str, Any], folder: str, allowed: int) -> None:
        """What the tasks cost there; nodes of one host one after the other, since they share its cores."""
        assert member.link is not None
        async with self._of_host[member.machine.address]:
            try:
                told = await member.ask(
                    "learn", dict(description), folder, allowed, seconds=self._pace.start, lost=self._pace.lost
                )
            except TimeoutError:
                self._refuse(member, f"measuring the networks took longer than {self._pace.start:g} s", again=False)
                return
            except NarrowboatError as error:
                self._refuse(member, str(error), again=_unreached(error))
                return
        member.learned = told
        member.answers()


def _unreached(error: NarrowboatError) -> bool:
    return type(error) in (NodeLostError, ClusterError)


def compare_weights(members: Iterable[Member]) -> None:
    """Nodes whose weights of a task are not those that most have cannot run it: answers would depend on the node."""
    seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
    there = [member for member in members if member.learned]
    for member in there:
        for task, told in member.learned.items():
            if told.get("weights"):
                seen[task][told["weights"]] += 1
    for member in there:
        for task, told in member.learned.items():
            mine = told.get("weights")
            if mine and len(seen[task]) > 1 and mine != (most := _most_common(seen[task])):
                others = [m.name for m in there if m.learned.get(task, {}).get("weights") == most]
                told["reason"] = f"its weights file is not the one that {', '.join(others[:3])} has"


def _most_common(counts: Counter[str]) -> str:
    """The commonest; of several the least, so that every look says the same."""
    most = max(counts.values())
    return min(value for value, count in counts.items() if count == most)


def require_some(members: Iterable[Member]) -> None:
    """At least one node can be used.

    Raises:
        ClusterError: none can; with what each said.
    """
    told = list(members)
    if not any(member.state in ("joining", "ready") for member in told):
        said = "; ".join(f"{member.name}: {member.said}" for member in told)
        raise ClusterError(f"none of the cluster's {len(told)} nodes can be used: {said}")
