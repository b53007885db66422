"""The ingress of a deployment: a gateway like that of one machine, with the nodes of a cluster behind it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from narrowboat.cluster.arrange import Arrangement, told_of
from narrowboat.cluster.ingress import bucket_of, crosses
from narrowboat.cluster.join import Joining, compare_weights, require_some
from narrowboat.cluster.link import Cluster
from narrowboat.cluster.member import Member
from narrowboat.cluster.node import parse_description
from narrowboat.cluster.ray_cluster import no_memory_offered
from narrowboat.cluster.routing import Router
from narrowboat.cluster.settings import ClusterSettings
from narrowboat.cluster.watcher import Watcher
from narrowboat.errors import (
    BadRequestError,
    BeyondContractError,
    ConflictError,
    NarrowboatError,
    NoSuchTaskError,
    NotServingError,
    PlacementError,
)
from narrowboat.serve.catalogue import Catalogue
from narrowboat.serve.hub import Hub, Subscription
from narrowboat.serve.interface import Reply, State, TaskFace
from narrowboat.serve.watch.watch import Watch
from narrowboat.tasks.contract import Bucket
from narrowboat.tasks.costed import burst_of
from narrowboat.tasks.record import Record
from narrowboat.tasks.tensors import RawTensor

_WATCHERS = 32
_TOLD = 20  # lines of what happened that are kept


class ClusterGateway:
    """See ``serve.interface.Gateway``; guarantees are those of each node, with the way there and back counted.

    Args:
        settings: of the deployment.
        cluster: whose nodes run the tasks.
        tell: called with what happened, in words.

    Attributes:
        state, said: see ``serve.interface.Gateway``.
        watch: over requests.
        members: the nodes, by identity.
        arrangement: which task runs where.
        allowed: microseconds of the way there and back that promises count.
        late_ways: requests whose way took longer than that.

    Raises:
        TaskSpecError: the tasks' file cannot be used, or describes tasks without a model.
    """

    def __init__(self, settings: ClusterSettings, cluster: Cluster, tell: Callable[[str], None]) -> None:
        self.state: State = "starting"
        self.said = "joining the cluster"
        self.watch = Watch()
        self.members: dict[str, Member] = {}
        self.allowed, self.late_ways = settings.ingress or 0, 0
        self.happened: deque[dict[str, Any]] = deque(maxlen=_TOLD)
        self._settings, self._cluster, self._said_to = settings, cluster, tell
        self._read()
        pace = settings.pace
        self.arrangement = Arrangement(self.members, pace.start, pace.lost, self._tell)
        self._joining = Joining(cluster, pace)
        self._router = Router(self._open_homes, pace.patience, pace.lost)
        self._hub = Hub(_WATCHERS)
        self._watching: asyncio.Task[None] | None = None

    def _read(self) -> None:
        self._catalogue = Catalogue(self._settings.tasks)
        self._description = parse_description(self._catalogue.settings)
        self._doors: dict[str, Bucket] = {}
        for name, spec in self._catalogue.specs.items():
            bucket = bucket_of(spec)
            if bucket is not None:
                self._doors[name] = bucket

    # -- from beginning to end -------------------------------------------------------------------------

    async def start(self) -> None:
        """Join, measure, place, start.

        Raises:
            NoClusterError: there is none, or nobody offers memory.
            PlacementError: a task with a guarantee has no place, and ``partial`` was not asked for.
            NarrowboatError: no node can be used.
        """
        await self._gather()
        await self.arrangement.settle()
        self._require_placed()
        self._watching = asyncio.create_task(self._watcher().run(), name="narrowboat-cluster")
        self._become("serving", "")
        self._changed()

    async def check(self) -> dict[str, Any]:
        """Join, measure and say where everything would go; nothing is started.

        Returns:
            ``{"nodes", "placement": {task: [names of nodes]}, "refused": {task: {node: reason}}, "ingress_us",
            "admitted"}``.

        Raises:
            NarrowboatError: as :meth:`start`, but for tasks without a place.
        """
        await self._gather()
        made = await self.arrangement.plan(self.arrangement.wanted)
        names = {identity: member.name for identity, member in self.members.items()}
        return {
            "nodes": [member.as_json() for member in self.members.values()],
            "placement": {task: [names[i] for i in made.node_of(task)] for task in self.arrangement.wanted},
            "refused": made.refused,
            "ingress_us": self.allowed,
            "admitted": not any(self._catalogue.specs[name].guaranteed for name in made.refused),
        }

    async def _gather(self) -> None:
        """The nodes that can be used, with what the tasks cost there."""
        await self._cluster.connect()
        machines = await self._cluster.machines()
        if not machines:
            raise no_memory_offered()
        self.members.update({machine.identity: Member(machine) for machine in machines})
        self._tell(f"{len(machines)} nodes: " + ", ".join(f"{m.name} ({m.budget >> 20} MiB)" for m in machines))
        there = list(self.members.values())
        await asyncio.gather(*(self._joining.open(member) for member in there))
        require_some(there)
        usable = [member for member in there if member.state == "joining"]
        if self._settings.ingress is None:
            ways = [await self._way(member) for member in usable]
            self.allowed = max(ways)
        self._tell(f"the way to a node and back is allowed {self.allowed / 1e3:g} ms")
        await asyncio.gather(*(self._learn(member) for member in usable))
        compare_weights(usable)
        require_some(there)
        self.arrangement.wanted = dict(self._catalogue.specs)

    def _watcher(self) -> Watcher:
        settings = self._settings
        return Watcher(
            self._cluster,
            self.members,
            self.arrangement,
            settings.pace,
            self._bring_in,
            self._tell,
            self._changed,
            settings.replicas,
        )

    def _require_placed(self) -> None:
        refused = self.arrangement.refused
        promised = {name: said for name, said in refused.items() if self._catalogue.specs[name].guaranteed}
        nowhere = len(refused) == len(self.arrangement.wanted)
        if promised and (nowhere or not self._settings.partial):
            more = "" if nowhere else "; --partial deploys the others without"
            raise PlacementError(f"no node takes {told_of(promised)}{more}", refused)
        if nowhere:
            raise PlacementError(f"no node takes {told_of(refused)}", refused)
        if refused:
            self._tell(f"without a place: {told_of(refused)}")

    async def _way(self, member: Member) -> int:
        try:
            return await self._joining.way(member)
        except (TimeoutError, NarrowboatError) as error:
            member.becomes("refused", f"its way could not be measured: {error or 'it did not answer'}")
            member.retry = time.monotonic() + self._settings.pace.lost
            return 0

    async def _learn(self, member: Member) -> None:
        if member.state == "refused":
            return
        self._tell(f"{member.name} measures what the networks cost there, if that is not known")
        await self._joining.learn(member, self._description, str(self._catalogue.folder), self.allowed)
        if member.state == "joining":
            member.becomes("ready")

    async def _bring_in(self, member: Member) -> None:
        """A node that has come after the start, or come again."""
        if member.state == "joining":
            await self._joining.open(member)
        if member.state in ("joining", "ready"):
            await self._learn(member)
            compare_weights(self.members.values())
        if member.state == "refused":
            self._tell(f"node {member.name} is not used: {member.said}")

    async def drain(self, seconds: float) -> None:
        """Let nothing in any more; what is under way ends, within so many seconds."""
        self._become("draining", "the ingress has been told to end")
        until = time.monotonic() + seconds
        while any(sum(m.under_way.values()) for m in self.members.values()) and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """End everything, on the nodes too."""
        self._become("stopped", self.said)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        links = [member.link for member in self.members.values() if member.link is not None]
        await asyncio.gather(*(link.close() for link in links), return_exceptions=True)
        await self._cluster.close()
        self._hub.close()
        self.watch.close()

    async def reload(self) -> None:
        """Read the file of tasks again, and place what it says now; every node starts its tasks anew.

        Raises:
            TaskSpecError: the file cannot be used; everything is as it was.
        """
        before = self._catalogue, self._description, self._doors
        try:
            self._read()
        except BaseException:
            self._catalogue, self._description, self._doors = before
            raise
        ready = self.arrangement.ready()
        await asyncio.gather(*(self._learn(member) for member in ready))
        compare_weights(ready)
        self.arrangement.wanted = dict(self._catalogue.specs)
        for member in ready:
            await self.arrangement.clear(member)
        await self.arrangement.settle()
        self._changed()

    # -- what is in force ------------------------------------------------------------------------------

    def _become(self, state: State, said: str) -> None:
        if self.state == "stopped":
            return
        self.state, self.said = state, said
        self.watch.state(state, said)
        self._hub.publish({"event": "state", "state": state, "said": said})

    def _tell(self, said: str) -> None:
        self.happened.append({"time": time.time(), "said": said})
        self._said_to(said)

    def _changed(self) -> None:
        self._hub.publish({"event": "plan", "plan": self.plan()})

    def _open_homes(self, task: str) -> list[Member]:
        return [member for member in self.arrangement.homes(task) if member.state == "ready"]

    # -- what clients ask ------------------------------------------------------------------------------

    def faces(self) -> Sequence[TaskFace]:
        """See ``serve.interface.Gateway``."""
        return [self.face(name) for name in sorted(self._catalogue.specs)]

    def face(self, name: str) -> TaskFace:
        """See ``serve.interface.Gateway``."""
        spec = self._catalogue.specs.get(name)
        if spec is None:
            known = ", ".join(sorted(self._catalogue.specs))
            raise NoSuchTaskError(f"there is no task {name!r:.80}; there are {known}")
        homes = self._open_homes(name)
        told = next((member.faces[name] for member in homes if name in member.faces), {})
        bounds = [member.faces.get(name, {}).get("bound") for member in homes]
        known_bounds = [bound for bound in bounds if bound is not None]
        way = self.allowed if crosses(spec) else 0
        return TaskFace(
            name,
            spec.model or "",
            bool(homes),
            crosses(spec),
            spec.guaranteed,
            told.get("inputs", ()),
            told.get("outputs", ()),
            max(known_bounds) + way if known_bounds and spec.guaranteed else None,
            spec.relative_deadline,
            spec.step,
            burst_of(spec),
            "" if homes else self._why_not(name),
            told.get("facts", {}),
        )

    def _why_not(self, name: str) -> str:
        if name not in self.arrangement.wanted:
            return "it is not loaded"
        if name in self.arrangement.refused:
            return "no node takes it: " + told_of({name: self.arrangement.refused[name]})
        return "it is being moved"

    async def infer(
        self, name: str, inputs: Mapping[str, RawTensor], *, timeout: int | None = None, priority: int = 0
    ) -> Reply:
        """See ``serve.interface.Gateway``."""
        with self.watch.infer(name) as seen:
            face = self.face(name)
            if self.state != "serving":
                raise NotServingError(f"{self.state}: {self.said or 'try again'}", retry_after=1.0)
            if not face.takes_requests:
                raise BadRequestError(f"task {name!r} takes its inputs itself: it has no `input: {{queue: NAME}}`")
            if not face.ready:
                moving = name in self.arrangement.wanted and name not in self.arrangement.refused
                raise NotServingError(
                    f"task {name!r} does not run: {face.reason}",
                    retry_after=self._settings.pace.lost if moving else None,
                )
            self._enter(name)
            began = time.perf_counter()
            reply = await self._router.infer(name, inputs, timeout, priority)
            response = round((time.perf_counter() - began) * 1e6)
            if response - reply.response > self.allowed:
                self.late_ways += 1
            deadline = face.deadline if timeout is None else min(face.deadline, timeout)
            bound = None if reply.bound is None else reply.bound + self.allowed
            told = Reply(reply.outputs, reply.admitted, bound, deadline, response, response <= deadline)
            seen.answered(told)
            return told

    def _enter(self, name: str) -> None:
        """Past the contract, which counts releases at this door."""
        bucket = self._doors.get(name)
        if bucket is None:
            return
        now = time.monotonic_ns() // 1000
        wait = bucket.wait(now)
        if wait:
            raise BeyondContractError(
                f"{name}: beyond its contract: the next request may come in {wait / 1e3:.1f} ms",
                retry_after=wait / 1e6,
            )
        bucket.take(now)

    async def load(self, name: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A task that was unloaded or found no place is given one. Raises as ``serve.interface.Gateway.load``."""
        if fields:
            raise BadRequestError("in a cluster a task is loaded as its file describes it: send the ingress HUP")
        self.face(name)
        self.arrangement.wanted[name] = self._catalogue.specs[name]
        await self.arrangement.settle()
        self._changed()
        if name in self.arrangement.refused:
            said = self.arrangement.refused[name]
            raise ConflictError(f"no node takes {told_of({name: said})}", details={"reasons": list(said.values())})
        return self.plan()

    async def unload(self, name: str) -> dict[str, Any]:
        """See ``serve.interface.Gateway``."""
        self.face(name)
        await self.arrangement.drop(name)
        self._changed()
        return self.plan()

    async def set_budget(self, budget: int | str) -> dict[str, Any]:
        """Budgets belong to nodes. Raises ConflictError."""
        raise ConflictError(
            "each node has its own budget, told to Ray when the node is started: start the node again with another"
        )

    async def what_if(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Where tasks of the file that do not run would go: ``{"add": [{"name": ...}]}``; nothing is changed."""
        add = question.get("add") or []
        if question.get("budget") is not None or question.get("remove"):
            raise BadRequestError("in a cluster what-if answers where tasks would go: {'add': [{'name': NAME}]}")
        names = [str(fields.get("name", "")) for fields in add]
        for name in names:
            self.face(name)
        wanted = self.arrangement.wanted
        hypothetical = {name: self._catalogue.specs[name] for name in names}
        before = dict(wanted)
        wanted.update(hypothetical)
        try:
            made = await self.arrangement.plan(names)
        finally:
            for name in names:
                if name not in before:
                    wanted.pop(name, None)
        return {
            "admitted": not made.refused,
            "reasons": [told_of({name: said}) for name, said in made.refused.items()],
            "suggestions": [],
            "plan": {name: [self.members[i].name for i in made.node_of(name)] for name in names},
            "change": None,
        }

    def plan(self) -> dict[str, Any]:
        """What runs where: docs/cluster.md, "The plan"."""
        nodes = [member.as_json() for member in self.members.values()]
        refused = self.arrangement.refused
        return {
            "admitted": not any(self._catalogue.specs[name].guaranteed for name in refused),
            "budget_bytes": sum(m.machine.budget for m in self.members.values() if m.state == "ready"),
            "needed_bytes": sum(node["needed_bytes"] for node in nodes),
            "ingress": {
                "allowed_us": self.allowed,
                "longest_us": max((member.longest for member in self.members.values()), default=0),
                "exceeded": self.late_ways,
            },
            "nodes": sorted(nodes, key=lambda node: node["name"]),
            "tasks": [self._told(face) for face in self.faces()],
            "moved": self.arrangement.moved,
            "asked_again": self._router.again,
            "happened": list(self.happened),
        }

    def _told(self, face: TaskFace) -> dict[str, Any]:
        homes = self.arrangement.homes(face.name)
        return {
            "name": face.name,
            "model": face.model,
            "guarantee": "guaranteed" if face.guaranteed else "best-effort",
            "takes_requests": face.takes_requests,
            "admitted": face.ready,
            "response_bound_us": face.bound,
            "deadline_us": face.deadline,
            "nodes": [member.name for member in homes],
            "under_way": sum(member.under_way[face.name] for member in homes),
            "refused": dict(self.arrangement.refused.get(face.name, {})),
            "reason": face.reason,
        }

    def feed(self) -> Subscription:
        """See ``serve.interface.Gateway``; there are no ticks: each node has its own clock."""
        return self._hub.subscribe({"state": self.state, "said": self.said, "plan": self.plan()})

    def record(self, seconds: float) -> Record:
        """Raises NoSuchTaskError: each node keeps its own record."""
        raise NoSuchTaskError("in a cluster each node keeps its own record; the ingress has none")


@contextlib.asynccontextmanager
async def serving(
    settings: ClusterSettings, cluster: Cluster, tell: Callable[[str], None] = lambda said: None
) -> AsyncIterator[ClusterGateway]:
    """A deployment for as long as the block runs.

    Raises:
        NarrowboatError: it could not be started; nothing of it is left.
    """
    gateway = ClusterGateway(settings, cluster, tell)
    try:
        await gateway.start()
        yield gateway
    finally:
        await gateway.close()
