"""Which node runs what, now: places what has no place, takes from nodes that are gone, and tells the nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from narrowboat.cluster.member import Member
from narrowboat.cluster.placement import Fit, Placement, Wanted, place
from narrowboat.errors import NarrowboatError, NodeLostError
from narrowboat.tasks.spec.schema import TaskSpec
from narrowboat.tasks.tensors import TensorSpec

_ROUNDS = 3  # in which a node may refuse what it had said would fit


class Arrangement:
    """The tasks and where they run.

    Args:
        members: all nodes, by identity; shared with whoever watches them.
        seconds: that a node may take to start what it is given.
        lost: seconds without any answer, after which that is waited for no longer.
        tell: called with what happened, in words.

    Attributes:
        wanted: tasks that should run, by name.
        refused: by task that has no place, what each node said.
        moved: tasks that went to another node since the start.
    """

    def __init__(
        self, members: Mapping[str, Member], seconds: float, lost: float, tell: Callable[[str], None]
    ) -> None:
        self.wanted: dict[str, TaskSpec] = {}
        self.refused: dict[str, dict[str, str]] = {}
        self.moved = 0
        self._members, self._seconds, self._lost, self._tell = members, seconds, lost, tell
        self._homes: dict[str, str] = {}
        self._arranging = asyncio.Lock()

    # -- what is where ---------------------------------------------------------------------------------

    def ready(self) -> list[Member]:
        """Nodes that can be given something, the largest first."""
        there = [member for member in self._members.values() if member.state == "ready"]
        return sorted(there, key=lambda member: (-member.machine.budget, member.name))

    def homes(self, task: str) -> list[Member]:
        """Nodes that were given a task, whether they answer or not."""
        return [member for member in self._members.values() if task in member.tasks and member.state != "lost"]

    def homeless(self) -> list[str]:
        """Tasks that should run and were given to nobody who is there."""
        return [name for name in self.wanted if not self.homes(name)]

    # -- changes ---------------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Find a place for every task that has none."""
        async with self._arranging:
            for _ in range(_ROUNDS):
                made = await self._place(self.homeless())
                if not await self._apply(made):
                    break

    async def plan(self, names: Iterable[str]) -> Placement:
        """Where these would go beside what runs; nothing is changed."""
        return await self._place([name for name in names if not self.homes(name)])

    async def drop(self, task: str) -> None:
        """A task that should run no more."""
        async with self._arranging:
            self.wanted.pop(task, None)
            self.refused.pop(task, None)
            self._homes.pop(task, None)
            for member in self.homes(task):
                await self._put(member, [name for name in member.tasks if name != task])

    async def more(self, task: str) -> bool:
        """A best-effort task on one more node, if there is room."""
        async with self._arranging:
            if task not in self.wanted:
                return False
            for member in sorted(self.ready(), key=lambda member: len(member.tasks)):
                if task in member.tasks or not member.can(task):
                    continue
                names = [*member.tasks, task]
                if (await self._fits(member, names)).fits and not await self._put(member, names):
                    self._tell(f"{task} runs on {member.name} too: its load asks for it")
                    return True
            return False

    async def fewer(self, task: str) -> None:
        """A best-effort task on one node less, the one that is told the least to do."""
        async with self._arranging:
            there = [member for member in self.homes(task) if member.state == "ready"]
            if len(there) > 1:
                member = min(there, key=lambda member: member.under_way[task])
                if not await self._put(member, [name for name in member.tasks if name != task]):
                    self._tell(f"{task} leaves {member.name}: fewer nodes will do")

    def changing(self) -> bool:
        """Nodes are being told what to run: what they say that they run may be what they ran."""
        return self._arranging.locked()

    async def clear(self, member: Member) -> str:
        """A node that comes back puts down what was moved from it meanwhile; why it does not, or ""."""
        async with self._arranging:
            return await self._put(member, [])

    async def restore(self, member: Member) -> None:
        """A node that does not run what it was given is given it again, and nothing else; or it goes elsewhere."""
        async with self._arranging:
            if await self._put(member, list(member.tasks)):
                member.tasks = ()
        await self.settle()

    # -- how -------------------------------------------------------------------------------------------

    async def _place(self, names: Sequence[str]) -> Placement:
        there = {member.machine.identity: member for member in self.ready()}

        async def fits(identity: str, tasks: frozenset[str]) -> Fit:
            member = there[identity]
            for task in tasks:
                reason = member.why_not(task)
                if reason:
                    return Fit(False, reason)
            return await self._fits(member, sorted(tasks))

        wanted = [self._as_wanted(self.wanted[name], there.values()) for name in names if name in self.wanted]
        budgets = {identity: member.machine.budget for identity, member in there.items()}
        made = await place(wanted, budgets, fits, {identity: member.tasks for identity, member in there.items()})
        for said in made.refused.values():
            for identity, member in self._members.items():  # those that could not even be asked
                if identity in said:
                    said[member.name] = said.pop(identity)
                elif member.state != "ready":
                    said[member.name] = member.why_not("")
            if "" in said and len(said) > 1:
                del said[""]
        return made

    def _as_wanted(self, spec: TaskSpec, members: Iterable[Member]) -> Wanted:
        known = [member.learned[spec.name] for member in members if member.can(spec.name)]
        return Wanted(
            spec.name,
            spec.guaranteed,
            min((told["utilisation"] for told in known), default=0.0),
            min((told["nbytes"] for told in known), default=0),
            spec.relative_deadline,
        )

    async def _fits(self, member: Member, names: Sequence[str]) -> Fit:
        try:
            told = await self._ask(member, "fits", list(names))
        except TimeoutError:
            return Fit(False, f"it took longer than {self._seconds:g} s to judge")
        except NarrowboatError as error:
            return Fit(False, str(error))
        return Fit(bool(told["fits"]), str(told["reason"]))

    async def _apply(self, made: Placement) -> bool:
        """Tell the nodes; whether one of them refused what it had said would fit."""
        self.refused = dict(made.refused)
        changed = [
            (member, names)
            for identity, names in made.nodes.items()
            if (member := self._members[identity]).state == "ready" and set(names) != set(member.tasks)
        ]
        failed = await asyncio.gather(*(self._put(member, list(names)) for member, names in changed))
        for (member, names), why in zip(changed, failed, strict=True):
            if why:
                self._tell(f"{member.name} cannot take {', '.join(names)}: {why}")
                for name in set(names) - set(member.tasks):
                    if name in member.learned and not member.gone.is_set():
                        member.learned[name]["reason"] = why
        return any(failed)

    async def _put(self, member: Member, names: Sequence[str]) -> str:
        """A node is told what to run; why it does not, or ""."""
        try:
            plan = await self._ask(member, "put", list(names))
            faces = await self._ask(member, "faces")
        except TimeoutError:
            return f"it took longer than {self._seconds:g} s to start"
        except NarrowboatError as error:
            return str(error) or type(error).__name__
        for name in set(names) - set(member.tasks):
            before = self._homes.get(name)
            if before is not None and before != member.machine.identity and len(self.homes(name)) == 0:
                self.moved += 1
                self._tell(f"{name} was moved to {member.name}")
            self._homes[name] = member.machine.identity
        member.answers()
        member.tasks, member.plan = tuple(names), plan
        member.faces = {face["name"]: {**face, **_tensors(face)} for face in faces}
        return ""

    async def _ask(self, member: Member, method: str, *arguments: Any) -> Any:
        if member.state not in ("ready", "joining"):
            raise NodeLostError(f"node {member.name} is {member.state}: {member.said}")
        return await member.ask(method, *arguments, seconds=self._seconds, lost=self._lost)


def _tensors(face: Mapping[str, Any]) -> dict[str, tuple[TensorSpec, ...]]:
    """Once for each change, and not for each request."""
    return {side: tuple(TensorSpec.from_json(shown) for shown in face[side]) for side in ("inputs", "outputs")}


def told_of(refused: Mapping[str, Mapping[str, Any]]) -> str:
    """Refusals in words."""
    return "; ".join(
        f"{task}: " + ", ".join(f"{node}: {why}" if node else str(why) for node, why in said.items())
        for task, said in refused.items()
    )
