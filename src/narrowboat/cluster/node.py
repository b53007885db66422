"""One node of a deployment: learns what tasks cost here, says what fits, and keeps an executor with those it gets.

No Ray here: whoever carries the calls calls the methods, all of them in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from narrowboat.cluster.facts import about_this_machine, weights_digest
from narrowboat.cluster.ingress import tasks_on_node
from narrowboat.cluster.settings import ROOT
from narrowboat.errors import ConflictError, NarrowboatError, NotServingError, TaskSpecError, WeightsNotFoundError
from narrowboat.serve.aside import aside
from narrowboat.serve.catalogue import Catalogue
from narrowboat.serve.gateway import LiveGateway
from narrowboat.serve.interface import Reply
from narrowboat.serve.logs import log
from narrowboat.serve.settings import ServeSettings
from narrowboat.tasks.spec.load import tasks_from
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec
from narrowboat.tasks.task_set import TaskSet
from narrowboat.tasks.tensors import RawTensor

_LOOK = 1.0  # seconds between looks at the lease
_DRAIN = 5.0  # seconds for jobs under way when tasks are put down


class NodeExecutor:
    """A node.

    Args:
        name: of it, in messages.
        budget: bytes that it gives.
        lease: seconds without a question after which it puts its tasks down; None for never.

    Attributes:
        born: tells one life of the node's process from another.
    """

    def __init__(self, name: str, budget: int, lease: float | None = None) -> None:
        self.name, self.budget, self.born = name, budget, uuid.uuid4().hex
        self._lease = lease
        self._heard = time.monotonic()
        self._folder = Path()
        self._known: TaskSet | None = None
        self._gateway: LiveGateway | None = None
        self._running: tuple[str, ...] = ()
        self._tick: dict[str, Any] = {}
        self._outdated = False  # what runs was started with another description
        self._following: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    # -- who it is -------------------------------------------------------------------------------------

    async def about(self) -> dict[str, Any]:
        """Host, versions, cores, budget; and which life of its process this is."""
        self._hear()
        return {**about_this_machine(), "budget": self.budget, "born": self.born}

    async def echo(self, payload: bytes, answer: int) -> bytes:
        """What takes as long as a job's way: a request of some size, and an answer of ``answer`` bytes."""
        return bytes(answer)

    async def beat(self, kept: bool = True) -> dict[str, Any]:
        """That it is there, what runs, and the newest picture of it.

        Args:
            kept: whoever asks has not given the node up. One that is given up may hear every question while its
                answers come too late: those questions must not keep its lease.
        """
        if kept:
            self._hear()
        gateway = self._gateway
        return {
            "born": self.born,
            "running": list(self._running),
            "state": gateway.state if gateway is not None else "idle",
            "said": gateway.said if gateway is not None else "",
            "tick": self._tick if gateway is not None else {},
        }

    def _hear(self) -> None:
        self._heard = time.monotonic()
        if self._lease is not None and self._watching is None:
            self._watching = asyncio.create_task(self._keep_lease(self._lease), name="narrowboat-lease")

    # -- what it knows ---------------------------------------------------------------------------------

    async def learn(self, description: Mapping[str, Any], folder: str, allowed: int) -> dict[str, dict[str, Any]]:
        """Measure here what the tasks cost, unless that is known.

        Args:
            description: of all tasks, as in tasks.yaml; its budget is not this node's.
            folder: that relative paths are meant from, unless this node's environment says otherwise.
            allowed: microseconds of the way to this node and back.

        Returns:
            By task: ``{"utilisation", "nbytes", "weights"}``, with the bytes that it needs alone and a digest of its
            weights; and ``{"reason"}`` where it cannot run here at all.

        Raises:
            TaskSpecError: the description is none.
        """
        self._hear()
        settings = tasks_from(description).model_copy(update={"budget": self.budget})
        self._folder = Path(os.environ.get(ROOT) or folder)
        settings, told = tasks_on_node(settings, allowed)
        found: dict[str, dict[str, Any]] = {name: {"reason": reason} for name, reason in told.items()}
        known, refused = await aside(partial(self._know, settings))
        found.update({name: {"reason": reason} for name, reason in refused.items()})
        if known is not None:
            for spec in known.settings.tasks:
                found[spec.name] = await aside(partial(self._alone, known, spec))
        async with self._changing:
            self._known = known
            self._outdated = self._gateway is not None
        return found

    def _know(self, settings: TasksSpec) -> tuple[TaskSet | None, dict[str, str]]:
        """The tasks with what they cost; and why some of them cannot be known here."""
        if not settings.tasks:
            return None, {}
        try:
            return self._measured(settings), {}
        except (NarrowboatError, OSError):
            pass  # one of them; which is found out one by one
        refused: dict[str, str] = {}
        for spec in settings.tasks:
            try:
                self._measured(settings.model_copy(update={"tasks": (spec,)}))
            except (NarrowboatError, OSError) as error:
                refused[spec.name] = str(error)
        usable = tuple(spec for spec in settings.tasks if spec.name not in refused)
        return (self._measured(settings.model_copy(update={"tasks": usable})) if usable else None), refused

    def _measured(self, settings: TasksSpec) -> TaskSet:
        for spec in settings.tasks:  # a file that is not there is known before a process is started
            try:
                weights_digest(spec, self._folder)
            except FileNotFoundError as error:
                raise WeightsNotFoundError(f"weights file not found on node {self.name}: {error.filename}") from error
        made = TaskSet(settings, self._folder)
        made.tell = lambda said: log("progress", node=self.name, said=said)
        made.costed  # noqa: B018 - measures
        return made

    def _alone(self, known: TaskSet, spec: TaskSpec) -> dict[str, Any]:
        """What a task costs and needs by itself."""
        told: dict[str, Any] = {"weights": weights_digest(spec, self._folder)}
        try:
            verdict = known.with_settings(known.settings.model_copy(update={"tasks": (spec,)})).admit()
        except NarrowboatError as error:  # it cannot even be laid out
            return {**told, "reason": str(error)}
        told |= {"utilisation": float(verdict.tasks[0].utilisation), "nbytes": verdict.needed_bytes}
        return told if verdict.admitted else {**told, "reason": "; ".join(verdict.reasons)}

    async def fits(self, names: Sequence[str]) -> dict[str, Any]:
        """Whether these tasks, and no others, would run here with all that is promised.

        Returns:
            ``{"fits", "reason", "suggestions"}``.
        """
        self._hear()
        return await aside(partial(self._judge, names))

    def _judge(self, names: Sequence[str]) -> dict[str, Any]:
        specs, unknown = self._specs(names)
        if unknown:
            return {"fits": False, "reason": f"{', '.join(unknown)} cannot run here", "suggestions": []}
        if not specs:
            return {"fits": True, "reason": "", "suggestions": []}
        assert self._known is not None
        try:
            asked = self._known.with_settings(self._known.settings.model_copy(update={"tasks": tuple(specs)}))
            verdict = asked.admit()
        except NarrowboatError as error:  # it cannot even be laid out
            return {"fits": False, "reason": str(error), "suggestions": []}
        return {
            "fits": verdict.admitted,
            "reason": "; ".join(verdict.reasons),
            "suggestions": list(verdict.suggestions),
        }

    def _specs(self, names: Sequence[str]) -> tuple[list[TaskSpec], list[str]]:
        there = {spec.name: spec for spec in self._known.settings.tasks} if self._known is not None else {}
        return [there[name] for name in names if name in there], [name for name in names if name not in there]

    # -- what it runs ----------------------------------------------------------------------------------

    async def put(self, names: Sequence[str]) -> dict[str, Any]:
        """Run exactly these tasks from now on; the plan, or ``{}`` of a node without any.

        Raises:
            ConflictError: admission refuses them.
            NarrowboatError: the executor could not be started.
        """
        self._hear()
        async with self._changing:
            return await self._put(names)

    async def _put(self, names: Sequence[str]) -> dict[str, Any]:
        specs, unknown = self._specs(names)
        if unknown:
            raise ConflictError(f"{', '.join(unknown)} cannot run on node {self.name}")
        if not specs:
            await self._put_down()
            return {}
        if self._gateway is None or self._outdated or self._gateway.state == "stopped":
            await self._put_down()
            await self._start([spec.name for spec in specs])
        elif set(names) != set(self._running):
            await self._gateway.run_only([spec.name for spec in specs])
        self._running = tuple(spec.name for spec in specs)
        self._hear()  # whoever asked for this has waited for it
        assert self._gateway is not None
        return self._gateway.plan()

    async def _start(self, names: Sequence[str]) -> None:
        assert self._known is not None
        catalogue = Catalogue.of(self._known.settings, self._folder, names)
        # Nobody but the ingress asks, and it is not over HTTP: of the settings only the limits count.
        settings = ServeSettings(tasks=self._folder / "tasks.yaml", port=0, grpc_port=None)
        gateway = LiveGateway(
            settings, lambda said: log("progress", node=self.name, said=said), catalogue, self._known
        )
        try:
            await gateway.start()
        except BaseException:
            await gateway.close()
            raise
        self._gateway = gateway
        self._following = asyncio.create_task(self._follow(gateway), name="narrowboat-follow")

    async def _follow(self, gateway: LiveGateway) -> None:
        feed = gateway.feed()
        try:
            async for event in feed:
                if event["event"] == "tick":
                    shown = ("now_us", "held_bytes", "peak_bytes", "budget_bytes", "tasks", "busy")
                    self._tick = {key: event[key] for key in shown if key in event}
        finally:
            feed.close()

    async def _put_down(self) -> None:
        gateway, self._gateway, self._running, self._tick = self._gateway, None, (), {}
        self._outdated = False
        if self._following is not None:
            self._following.cancel()
            self._following = None
        if gateway is not None:
            with contextlib.suppress(NarrowboatError):
                await gateway.drain(_DRAIN)
            await gateway.close()

    async def faces(self) -> list[dict[str, Any]]:
        """What the running tasks take and give, as their gateway tells it."""
        gateway = self._gateway
        if gateway is None:
            return []
        return [
            {
                "name": face.name,
                "inputs": [spec.as_json() for spec in face.inputs],
                "outputs": [spec.as_json() for spec in face.outputs],
                "bound": face.bound,
                "facts": dict(face.facts),
            }
            for face in gateway.faces()
            if face.ready
        ]

    async def plan(self) -> dict[str, Any]:
        """That is in force; ``{}`` of a node without tasks."""
        return self._gateway.plan() if self._gateway is not None else {}

    async def infer(
        self, task: str, inputs: Mapping[str, RawTensor], timeout: int | None = None, priority: int = 0
    ) -> Reply:
        """One job here. Raises as ``serve.interface.Gateway.infer``."""
        gateway = self._gateway
        if gateway is None or task not in self._running:
            raise NotServingError(f"task {task!r} does not run on node {self.name} now", retry_after=1.0)
        return await gateway.infer(task, inputs, timeout=timeout, priority=priority)

    # -- its end ---------------------------------------------------------------------------------------

    async def _keep_lease(self, lease: float) -> None:
        """Nobody asks any more: what runs here runs elsewhere by now, or nowhere on purpose."""
        while True:
            await asyncio.sleep(min(_LOOK, lease / 4))
            if self._gateway is not None and time.monotonic() - self._heard > lease and not self._changing.locked():
                log("lease", node=self.name, said=f"nothing was heard for {lease:g} s: the tasks are put down")
                async with self._changing:
                    await self._put_down()

    async def close(self) -> None:
        """End all of it."""
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        await self._put_down()


def parse_description(settings: TasksSpec) -> dict[str, Any]:
    """A description as a node is told it: plain fields, as they could stand in tasks.yaml.

    Raises:
        TaskSpecError: tasks described by blocks cannot run anywhere.
    """
    described = [spec.name for spec in settings.tasks if spec.blocks is not None]
    if described:
        raise TaskSpecError(f"{', '.join(described)}: described by blocks, without a model: name models to deploy")
    return settings.plain()
