"""A cluster without Ray: nodes in this process, that can be slow, silent, dead, and started anew."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrowboat.cluster.facts import versions
from narrowboat.cluster.link import Failure, pack_reply, unpack_inputs
from narrowboat.cluster.machines import Machine
from narrowboat.cluster.settings import ClusterSettings, Pace
from narrowboat.errors import BeyondContractError, ConflictError, NarrowboatError, NodeLostError
from narrowboat.serve.interface import Reply
from narrowboat.tasks.tensors import RawTensor, TensorSpec

MIB = 1 << 20
PACE = Pace(beat=0.02, silent=0.2, lost=0.6, lease=1.2, patience=3.0, start=5.0)
X = {"x": RawTensor("FP32", (2,), b"12345678")}


@dataclass
class FakeNode:
    """A node.

    Attributes:
        name: of it.
        budget: bytes.
        sizes: bytes of each task; a task without one cannot run here.
        takes: seconds of one job.
        silent: it gives no answer to anything.
        dead: every call fails at once.
        refuses: tasks that it refuses to start though they would fit.
        busy: jobs are beyond the contract.
        kept: what the newest question said of its lease.
        late: seconds that its answers are under way.
    """

    name: str
    budget: int
    sizes: Mapping[str, int]
    takes: float = 0.0
    silent: bool = False
    dead: bool = False
    refuses: frozenset[str] = frozenset()
    busy: bool = False
    weights: str = "w"
    runs: Mapping[str, str] = field(default_factory=versions)
    born: str = field(default_factory=lambda: uuid.uuid4().hex)
    running: tuple[str, ...] = ()
    jobs: int = 0
    kept: bool = True
    late: float = 0.0
    learned: list[int] = field(default_factory=list)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    address: str = ""

    @property
    def machine(self) -> Machine:
        """As the cluster tells it."""
        return Machine(f"id-{self.name}", self.name, self.budget, self.address or self.name)

    async def call(self, method: str, *arguments: Any) -> Any:
        """See ``NodeLink``."""
        await asyncio.sleep(0)
        while self.silent and not self.dead:
            await asyncio.sleep(0.01)
        if self.dead:
            raise NodeLostError(f"node {self.name} is dead")
        try:
            told = await getattr(self, f"_{method}")(*arguments)
            await asyncio.sleep(self.late)
            return told
        except NarrowboatError as error:
            raise Failure.of(error).error() from None

    async def close(self) -> None:
        """See ``NodeLink``."""
        self.running = ()

    async def _about(self) -> dict[str, Any]:
        return {"host": self.name, "versions": dict(self.runs), "budget": self.budget, "born": self.born}

    async def _echo(self, payload: bytes, answer: int) -> bytes:
        return bytes(answer)

    async def _beat(self, kept: bool = True) -> dict[str, Any]:
        self.kept = kept
        held = sum(self.sizes[name] for name in self.running)
        tick = {"held_bytes": held, "peak_bytes": held}
        return {"born": self.born, "running": list(self.running), "state": "serving", "said": "", "tick": tick}

    async def _learn(self, description: Mapping[str, Any], folder: str, allowed: int) -> dict[str, Any]:
        self.learned.append(allowed)
        return {
            task["name"]: {"utilisation": 0.1, "nbytes": self.sizes[task["name"]], "weights": self.weights}
            if task["name"] in self.sizes
            else {"reason": "weights file not found: weights.safetensors"}
            for task in description["tasks"]
        }

    async def _fits(self, names: Sequence[str]) -> dict[str, Any]:
        self.asked.append(tuple(names))
        need = sum(self.sizes[name] for name in names)
        fits = need <= self.budget
        return {"fits": fits, "reason": "" if fits else f"{need >> 20} MiB are needed", "suggestions": []}

    async def _put(self, names: Sequence[str]) -> dict[str, Any]:
        if self.refuses & set(names):
            raise ConflictError("the executor could not be started")
        assert sum(self.sizes[name] for name in names) <= self.budget, "a node is never given more than it holds"
        self.running = tuple(names)
        return {"needed_bytes": sum(self.sizes[name] for name in names), "utilisation": 0.1 * len(names)}

    async def _faces(self) -> list[dict[str, Any]]:
        spec = {"name": "x", "datatype": "FP32", "shape": [2]}
        return [
            {"name": name, "inputs": [spec], "outputs": [spec], "bound": 5000, "facts": {}} for name in self.running
        ]

    async def _infer(self, task: str, inputs: Any, timeout: int | None, priority: int) -> Any:
        if self.busy:
            raise BeyondContractError(f"{task}: too many", retry_after=0.5)
        assert task in self.running
        self.jobs += 1
        await asyncio.sleep(self.takes)
        while self.silent and not self.dead:
            await asyncio.sleep(0.01)
        if self.dead:
            raise NodeLostError(f"node {self.name} died")
        raw = unpack_inputs(inputs)["x"]
        return pack_reply(Reply(((TensorSpec("x", "FP32", (2,)), raw),), True, 5000, 9000, 1000, True))


class FakeCluster:
    """See ``link.Cluster``; nodes can be taken out and put in."""

    def __init__(self, *nodes: FakeNode) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.hidden: set[str] = set()
        self.closed = False

    async def connect(self) -> None:
        """See ``link.Cluster``."""

    async def machines(self) -> list[Machine]:
        """See ``link.Cluster``."""
        return [node.machine for node in self.nodes.values() if node.name not in self.hidden]

    async def open(self, machine: Machine, lease: float) -> FakeNode:
        """See ``link.Cluster``."""
        return self.nodes[machine.name]

    async def close(self) -> None:
        """See ``link.Cluster``."""
        self.closed = True


def describe(folder: Path, *tasks: str, free: Sequence[str] = ()) -> Path:
    """A file of tasks: those named promise their deadlines, the free ones nothing; all take requests."""
    lines = ["budget: 1GiB", "tasks:"]
    for name in (*tasks, *free):
        guarantee = "best-effort" if name in free else "guaranteed"
        lines.append(
            f"  - {{name: {name}, model: 'zoo:resnet18', weights: {name}.safetensors, input: {{queue: q}}, "
            f"contract: {{burst: 20, period: 50ms}}, deadline: 900ms, guarantee: {guarantee}}}"
        )
    path = folder / "tasks.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings(path: Path, **more: Any) -> ClusterSettings:
    """With times that a test can wait for."""
    return ClusterSettings(path, pace=more.pop("pace", PACE), **more)


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for it."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
