"""What a deployment over several nodes is told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from narrowboat.errors import UsageError

MEMORY = "narrowboat_memory"
"""The Ray resource by which a node says how many bytes it gives to narrowboat."""
NAME = "narrowboat-node"
"""The Ray label by which a node may say what it is called."""
ROOT = "NARROWBOAT_ROOT"
"""The environment variable that says, on a node, what relative paths in tasks.yaml are meant from."""


@dataclass(frozen=True)
class Pace:
    """How soon things are noticed. Seconds.

    Attributes:
        beat: between two questions to a node whether it is there.
        silent: without an answer, after which nothing more is sent to a node, and what waits for it goes elsewhere.
        lost: without an answer, after which its tasks are moved. A node that Ray calls dead is lost at once.
        lease: without a question, after which a node puts its tasks down: it has been given up by then.
        patience: for one request, where its client sets no time.
        start: for a node to start what it is to run: its networks may have to be measured.
    """

    beat: float = 0.5
    silent: float = 3.0
    lost: float = 12.0
    lease: float = 20.0
    patience: float = 60.0
    start: float = 600.0

    def __post_init__(self) -> None:
        if not 0 < self.beat < self.silent < self.lost < self.lease:
            raise UsageError(
                "a cluster's times have to grow from beat over silent and lost to lease, and these are "
                f"{self.beat:g}, {self.silent:g}, {self.lost:g} and {self.lease:g} s"
            )


@dataclass(frozen=True)
class ClusterSettings:
    """All of it.

    Attributes:
        tasks: the file of tasks. Its budget is not used: each node has its own.
        address: of the Ray cluster; "auto" finds the one that this machine belongs to.
        ingress: microseconds that a request and its answer may be under way outside of a node's executor; None to
            measure it.
        partial: deploy what can be placed, even if a task with a guarantee cannot.
        pace: how soon things are noticed.
        replicas: most nodes that run one best-effort task at once; None for all.
    """

    tasks: Path
    address: str = "auto"
    ingress: int | None = None
    partial: bool = False
    pace: Pace = Pace()
    replicas: int | None = None

    def __post_init__(self) -> None:
        if self.ingress is not None and self.ingress <= 0:
            raise UsageError("--ingress has to be more than 0: nothing crosses a network in no time")
        if self.replicas is not None and self.replicas < 1:
            raise UsageError("--replicas has to be at least 1")
