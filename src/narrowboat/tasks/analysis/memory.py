"""The memory a set of tasks needs at its worst instant, by how jobs are preempted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrowboat.tasks.analysis.model import Block


@dataclass(frozen=True)
class Footprint:
    """What one task's jobs hold, in bytes.

    Attributes:
        name: of the task.
        running: while one runs: two consecutive blocks and the activations.
        kept: while one is preempted: its loaded block and the activations.
        level: jobs of a task are preempted only by tasks of a smaller level (relative deadline; less important).
        pinned: weights that are never swapped; those of several tasks with one network count once.
        network: whose weights; tasks that share one share its pinned bytes.
    """

    name: str
    running: int
    kept: int
    level: int
    pinned: int = 0
    network: str = ""


@dataclass(frozen=True)
class MemoryNeed:
    """The worst instant.

    Attributes:
        nbytes: needed in all.
        pinned: of them, resident weights.
        running: the task that runs at the worst instant; empty without tasks.
        kept: the tasks that are preempted then, with a block each.
        by_task: bytes of each of those.
    """

    nbytes: int
    pinned: int
    running: str
    kept: tuple[str, ...]
    by_task: dict[str, int]


def footprint(
    name: str,
    blocks: Sequence[Block],
    activation_bytes: int,
    level: int,
    *,
    pinned: int = 0,
    network: str = "",
    resident: bool = False,
) -> Footprint:
    """Of a task with these blocks.

    Args:
        name: of the task.
        blocks: of one job; pinned ones have 0 bytes.
        activation_bytes: of one job, workspaces included.
        level: see :class:`Footprint`.
        pinned: bytes of weights that stay.
        network: whose weights those are.
        resident: whether all weights stay, and none is swapped.
    """
    sizes = [0 if resident else block.nbytes for block in blocks]
    return Footprint(
        name,
        largest_pair(sizes) + activation_bytes,
        max(sizes, default=0) + activation_bytes,
        level,
        pinned + (sum(block.nbytes for block in blocks) if resident else 0),
        network,
    )


def largest_pair(sizes: Sequence[int]) -> int:
    """The most bytes that two neighbouring blocks have together: the window one job needs."""
    return max((a + b for a, b in zip(sizes, [*sizes[1:], 0], strict=True)), default=0)


def pinned_bytes(tasks: Sequence[Footprint]) -> int:
    """Resident weights: one copy of each network, the largest that any of its tasks asks for."""
    networks: dict[str, int] = {}
    for place, task in enumerate(tasks):
        key = task.network or f"\0{place}"
        networks[key] = max(networks.get(key, 0), task.pinned)
    return sum(networks.values())


def need(tasks: Sequence[Footprint], *, keep: bool) -> MemoryNeed:
    """Bytes needed at the worst instant.

    With ``keep``, ``P + max over i of (running_i + sum over k of a larger level of kept_k)``: a job is preempted only
    by jobs of a smaller level, and each keeps its block. Without, jobs are not preempted: ``P + max running``.
    """
    pinned = pinned_bytes(tasks)
    worst = MemoryNeed(pinned, pinned, "", (), {})
    for task in tasks:
        below = [other for other in tasks if keep and other.level > task.level]
        nbytes = pinned + task.running + sum(other.kept for other in below)
        if nbytes > worst.nbytes or not worst.running:
            worst = MemoryNeed(
                nbytes,
                pinned,
                task.name,
                tuple(other.name for other in below),
                {task.name: task.running, **{other.name: other.kept for other in below}},
            )
    return worst
