"""A Ray cluster of several nodes on this machine, to try a deployment before there are machines, and for tests.

    python -m narrowboat.cluster.local left=100MiB right=100MiB

starts one until it is interrupted, and says its address. Each node is a raylet of its own, which can be killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrowboat.cluster.ray_cluster import require_ray
from narrowboat.cluster.settings import MEMORY, NAME
from narrowboat.errors import UsageError
from narrowboat.quantities import parse_bytes

_STORE = 80 << 20  # bytes of each node's object store


@dataclass
class LocalNode:
    """One node.

    Attributes:
        name: of our choosing; Ray knows it by the resource ``node_NAME`` and the label ``narrowboat-node``.
        identity: Ray's, hexadecimal.
        handle: of ``ray.cluster_utils``.
    """

    name: str
    identity: str
    handle: Any

    def processes(self) -> list[int]:
        """The raylet and all that it has started."""
        raylet = self.handle.all_processes["raylet"][0].process.pid
        return [raylet, *_descendants(raylet)]

    def freeze(self) -> None:
        """The node says nothing any more, and is not dead: as behind a cut cable."""
        for pid in self.processes():
            _send(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """The cable is mended."""
        for pid in self.processes():
            _send(pid, signal.SIGCONT)


@dataclass
class LocalCluster:
    """Several nodes.

    Attributes:
        address: for ``ray.init``.
        nodes: by name; the head node gives nothing to narrowboat and is not among them.
    """

    address: str
    cluster: Any
    nodes: dict[str, LocalNode] = field(default_factory=dict)

    def add(
        self, name: str, budget: int, *, cpus: float = 1, environment: Mapping[str, str] | None = None
    ) -> LocalNode:
        """Another node, or one that comes back.

        Args:
            name: of it.
            budget: bytes for narrowboat; 0 for none.
            cpus: for Ray's accounts.
            environment: of everything on this node, beside this process's own.
        """
        resources: dict[str, float] = {f"node_{name}": 1}
        if budget:
            resources[MEMORY] = budget
        handle = self.cluster.add_node(
            num_cpus=cpus,
            resources=resources,
            labels={NAME: name},
            object_store_memory=_STORE,
            node_ip_address="127.0.0.1",
            env_vars=dict(environment or {}),
        )
        self.nodes[name] = LocalNode(name, handle.node_id, handle)
        return self.nodes[name]

    def kill(self, name: str) -> None:
        """A node dies with everything on it, without a word."""
        node = self.nodes.pop(name)
        for pid in node.processes():
            _send(pid, signal.SIGKILL)
        self.cluster.remove_node(node.handle, allow_graceful=False)


@contextlib.contextmanager
def local_cluster(budgets: Sequence[tuple[str, int]], *, head_cpus: float = 1) -> Iterator[LocalCluster]:
    """A cluster of one head node and the given ones; this process is connected to it (``ray.init`` has been called).

    Args:
        budgets: name and bytes of each node.
        head_cpus: of the head node.

    Raises:
        NoClusterError: Ray is not installed.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Everything listens on, and is called at, 127.0.0.1: in children, and here if Ray has been imported before.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray
    from ray._private import ray_constants
    from ray.cluster_utils import Cluster

    ray_constants.ENABLE_RAY_CLUSTER = False

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": head_cpus,
            "object_store_memory": _STORE,
            "node_ip_address": "127.0.0.1",
            "include_dashboard": False,
        },
    )
    made = LocalCluster(cluster.address, cluster)
    try:
        for name, budget in budgets:
            made.add(name, budget)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield made
    finally:
        if ray.is_initialized():  # otherwise Serve would start a cluster to end itself on
            with contextlib.suppress(Exception):
                from ray import serve

                serve.shutdown()
        ray.shutdown()
        for node in made.nodes.values():
            node.thaw()
        cluster.shutdown()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main(arguments: Sequence[str]) -> None:
    """Start the nodes that are named, say where, and wait to be interrupted. Raises UsageError."""
    nodes = []
    for argument in arguments:
        name, sign, budget = argument.partition("=")
        if not sign or not name.isidentifier():
            raise UsageError(f"{argument!r}: give NAME=BYTES for each node, such as left=100MiB")
        nodes.append((name, parse_bytes(budget)))
    if not nodes:
        raise UsageError("give NAME=BYTES for each node, such as left=100MiB right=100MiB")
    with contextlib.suppress(KeyboardInterrupt), local_cluster(nodes) as cluster:
        print(f"narrowboat deploy TASKS.yaml --address {cluster.address}", flush=True)
        signal.pause()


if __name__ == "__main__":
    import sys

    from narrowboat.errors import NarrowboatError

    try:
        main(sys.argv[1:])
    except NarrowboatError as error:
        sys.exit(f"error: {error}")
