"""Looks after the nodes: who is new, who is silent, who is lost, who is back; and has tasks moved accordingly."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from narrowboat.cluster.arrange import Arrangement, told_of
from narrowboat.cluster.link import Cluster
from narrowboat.cluster.machines import Machine
from narrowboat.cluster.member import Member
from narrowboat.cluster.scale import Demand
from narrowboat.cluster.settings import Pace
from narrowboat.errors import NarrowboatError

_FORGET = 600.0  # seconds after which a lost node is not shown any more


class Watcher:
    """A loop that ends with the ingress.

    Args:
        cluster: whose nodes they are.
        members: by identity; those that appear are added.
        arrangement: of the tasks.
        pace: how soon things are noticed.
        bring_in: makes a new member ready, or refuses it.
        tell: called with what happened, in words.
        changed: called when states or placement have changed.
        replicas: most nodes that run one best-effort task; None for all.
    """

    def __init__(
        self,
        cluster: Cluster,
        members: dict[str, Member],
        arrangement: Arrangement,
        pace: Pace,
        bring_in: Callable[[Member], Awaitable[None]],
        tell: Callable[[str], None],
        changed: Callable[[], None],
        replicas: int | None = None,
    ) -> None:
        self._cluster, self._members, self._arrangement = cluster, members, arrangement
        self._pace, self._bring_in, self._tell, self._changed = pace, bring_in, tell, changed
        self._replicas = replicas
        self._beating: dict[str, asyncio.Task[None]] = {}
        self._restoring: set[str] = set()
        self._refused: dict[str, dict[str, str]] = {}  # as it was told last
        self._working: set[asyncio.Task[None]] = set()
        self._demand: dict[str, Demand] = {}
        self._looking: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        looked = time.monotonic()
        for member in self._members.values():
            member.answers()  # until now nobody asked
        try:
            while True:
                looked = self._forgive(looked)
                self._look()
                for member in list(self._members.values()):
                    self._look_at(member)
                self._scale()
                await asyncio.sleep(self._pace.beat)
        finally:
            tasks = [*self._beating.values(), *self._working, *([self._looking] if self._looking else [])]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _forgive(self, looked: float) -> float:
        """Time in which we ourselves did not run (stopped, or starved) is nobody's silence; the time now."""
        now = time.monotonic()
        late = now - looked - self._pace.beat
        if late > self._pace.beat:
            for member in self._members.values():
                member.heard += late
        return now

    # -- who there is ----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask the cluster, which may not answer at once."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._ask_cluster(), name="narrowboat-membership")

    async def _ask_cluster(self) -> None:
        try:
            machines = await self._cluster.machines()
        except NarrowboatError as error:
            self._tell(f"the cluster does not say who is there: {error}")
            await asyncio.sleep(self._pace.silent)
            return
        self.compare(machines)

    def compare(self, machines: Sequence[Machine]) -> None:
        """Those that are new come in, those that are not there any more are lost."""
        there = {machine.identity: machine for machine in machines}
        for identity, machine in there.items():
            if identity not in self._members:
                member = self._members[identity] = Member(machine)
                self._tell(f"node {machine.name} has come")
                self._do(self._join(member))
            elif (known := self._members[identity]).retry is not None and time.monotonic() > known.retry:
                known.becomes("joining", "it is tried again")
                self._do(self._join(known))
        for identity, member in list(self._members.items()):
            if identity not in there:
                if member.state != "lost":
                    self._lose(member, "it is not in the cluster any more")
                elif time.monotonic() - member.heard > _FORGET:
                    del self._members[identity]

    async def _join(self, member: Member) -> None:
        await self._bring_in(member)
        if member.state == "ready":
            await self._arrangement.settle()
        self._changed()

    # -- whether it is there ---------------------------------------------------------------------------

    def _look_at(self, member: Member) -> None:
        identity = member.machine.identity
        if member.state in ("joining", "refused") or member.link is None:
            return
        beating = self._beating.get(identity)
        if beating is None or beating.done():
            self._beating[identity] = asyncio.create_task(self._beat(member), name="narrowboat-beat")
        silent = time.monotonic() - member.heard
        if member.state == "ready" and silent > self._pace.silent:
            member.becomes("silent", f"it has not answered for {silent:.1f} s")
            self._tell(f"node {member.name} is silent")
            self._changed()
        if member.state == "silent" and silent > self._pace.lost:
            self._lose(member, f"it has not answered for {silent:.0f} s")

    async def _beat(self, member: Member) -> None:
        assert member.link is not None
        try:
            told = await asyncio.wait_for(member.link.call("beat", member.state != "lost"), self._pace.lost)
        except (TimeoutError, NarrowboatError):
            return
        member.answers()
        member.tick = told["tick"]
        if member.state == "silent":
            member.becomes("ready")
            self._tell(f"node {member.name} answers again")
            self._changed()
        elif member.state == "lost":
            self._do(self._back(member))
        if member.state == "ready" and (told["born"] != member.about["born"] or told["state"] == "stopped"):
            if self._once(member, self._again):
                self._tell(
                    f"the executor's process on {member.name} was started anew: its tasks are given to it again"
                )
                member.about["born"] = told["born"]
        elif member.state == "ready" and set(member.tasks) != set(told["running"]):
            # It put them down because it heard nothing for its lease, and is heard again before it was given up; or
            # it runs what it was told by a question whose answer never came.
            self._once(member, self._agree)

    async def _back(self, member: Member) -> None:
        """It was given up, and is there all the same: what it had runs elsewhere, or waits for a place."""
        member.becomes("joining", "it is back")
        self._tell(f"node {member.name} is back")
        why = await self._arrangement.clear(member)
        if member.state != "joining":  # it has left the cluster meanwhile
            return
        if why:
            member.becomes("lost", f"it did not put down what it ran: {why}")
            self._tell(f"node {member.name} is lost again: {member.said}")
        else:
            member.becomes("ready")
            await self._arrangement.settle()
        self._changed()

    def _once(self, member: Member, work: Callable[[Member], Awaitable[None]]) -> bool:
        """Whether it is begun: not while it is being done, or while nodes are told what to run."""
        identity = member.machine.identity
        if identity in self._restoring or self._arrangement.changing():
            return False
        self._restoring.add(identity)

        async def once() -> None:
            try:
                await work(member)
            finally:
                self._restoring.discard(identity)

        self._do(once())
        return True

    async def _agree(self, member: Member) -> None:
        await self._arrangement.restore(member)
        self._changed()

    async def _again(self, member: Member) -> None:
        await self._bring_in(member)
        if member.state == "ready":
            await self._arrangement.restore(member)
        elif member.state == "refused":
            member.tasks = ()
            await self._arrangement.settle()
        self._changed()

    def _lose(self, member: Member, said: str) -> None:
        member.becomes("lost", said)
        tasks, member.tasks = member.tasks, ()
        member.faces, member.plan, member.tick = {}, {}, {}
        moving = f"; {', '.join(tasks)} must move" if tasks else ""
        self._tell(f"node {member.name} is lost: {said}{moving}")
        self._changed()
        self._do(self._move())

    async def _move(self) -> None:
        await self._arrangement.settle()
        before, self._refused = self._refused, dict(self._arrangement.refused)
        for name, said in self._refused.items():
            if before.get(name) != said:
                self._tell(f"no node takes {told_of({name: said})}")
        self._changed()

    # -- how much is asked of them ---------------------------------------------------------------------

    def _scale(self) -> None:
        ready = self._arrangement.ready()
        for name, spec in self._arrangement.wanted.items():
            if spec.guaranteed:
                continue
            homes = [member for member in ready if name in member.tasks]
            able = sum(member.can(name) for member in ready)
            most = able if self._replicas is None else min(able, self._replicas)
            under_way = sum(member.under_way[name] for member in homes)
            demand = self._demand.setdefault(name, Demand())
            way = demand.look(time.monotonic(), under_way, len(homes), most)
            if way > 0:
                self._do(self._more(name))
            elif way < 0:
                self._do(self._fewer(name))

    async def _more(self, name: str) -> None:
        if await self._arrangement.more(name):
            self._changed()

    async def _fewer(self, name: str) -> None:
        await self._arrangement.fewer(name)
        self._changed()

    def _do(self, work: Any) -> None:
        """Beside the loop, which must go on looking."""
        task = asyncio.ensure_future(work)
        self._working.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._working.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._tell(f"looking after the nodes failed: {type(error).__name__}: {error}")
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop().call_exception_handler({"message": "cluster", "exception": error})
