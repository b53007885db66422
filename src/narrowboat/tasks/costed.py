"""A task with what it costs: the finest blocks, activations, and which of its weights stay in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from narrowboat.tasks.analysis.cuts import balanced_cuts, merge
from narrowboat.tasks.analysis.memory import Footprint, footprint
from narrowboat.tasks.analysis.model import Arrival, Block, Task
from narrowboat.tasks.analysis.pipeline import segments
from narrowboat.tasks.job import TaskFacts
from narrowboat.tasks.spec.schema import TaskSpec, TasksSpec

_STIRRED = 1.06  # jobs that preempt each other leave other holes than each by itself: 8 MiB of 100 were seen
_NOBODY = 1 << 40  # level of tasks that anybody may preempt


@dataclass(frozen=True)
class CostedTask:
    """One task, measured or described.

    Attributes:
        spec: what was asked for.
        units: in order, what is not cut further; with the bytes and load each has when it is not pinned.
        activation_bytes: of one job, workspaces included.
        fixed_bytes: held all the time beside weights that could be swapped: buffers, bookkeeping, kernels.
        busy_bytes: what the heap takes while a job of a measured network runs: activations, workspaces, holes.
        carried_bytes: the most of its activations that a job holds at a boundary, while others run.
        staying_bytes: of those, weights that cannot be swapped.
        network: what tasks that share weights have in common; empty where nothing is shared.
        pins: the units whose weights stay.
        ends: where blocks end, as places one past their last unit; None for a block per unit.
        samples: where it was measured, times by (load or compute, pass, unit), microseconds, the margin included.
            The worst of a block is the worst of its passes, which is less than the sum of its units' worst.
    """

    spec: TaskSpec
    units: tuple[Block, ...]
    activation_bytes: int = 0
    fixed_bytes: int = 0
    network: str = ""
    pins: frozenset[int] = frozenset()
    ends: tuple[int, ...] | None = None
    staying_bytes: int = 0
    busy_bytes: int = 0
    carried_bytes: int = 0
    samples: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Of the task."""
        return self.spec.name

    @property
    def pinned_bytes(self) -> int:
        """Weights that stay."""
        return sum(self.units[unit].nbytes for unit in self.pins)

    @property
    def swappable(self) -> list[int]:
        """Units that could be pinned, and are not."""
        return [i for i, unit in enumerate(self.units) if i not in self.pins and unit.nbytes]

    def with_pins(self, pins: frozenset[int]) -> CostedTask:
        """The same with other weights resident."""
        return replace(self, pins=pins)

    def blocks(self) -> list[Block]:
        """What swaps together."""
        units = [
            Block(0, max(unit.compute, 1), 0) if place in self.pins else unit for place, unit in enumerate(self.units)
        ]
        if self.ends is None:
            return merge(units, range(1, len(units) + 1))
        merged = merge(units, self.ends)
        return merged if self.samples is None else self._as_seen(merged)

    def _as_seen(self, merged: list[Block]) -> list[Block]:
        """The same blocks with the largest of their own times in any pass."""
        assert self.samples is not None and self.ends is not None
        loads, computes = self.samples.copy()
        loads[:, sorted(self.pins)] = 0
        starts = [0, *self.ends[:-1]]
        load = np.add.reduceat(loads, starts, axis=1).max(axis=0)
        compute = np.add.reduceat(computes, starts, axis=1).max(axis=0)
        return [
            Block(min(int(a), block.load), max(min(int(b), block.compute), 1), block.nbytes)
            for a, b, block in zip(load, compute, merged, strict=True)
        ]

    def with_ends(self, ends: tuple[int, ...]) -> CostedTask:
        """The same in other blocks."""
        return replace(self, ends=ends)

    def pin_gains(self) -> dict[int, tuple[int, int]]:
        """For every unit that could be pinned: the time of a job that saves, and the loading.

        A block's load counts where it is longer than computing the block before.
        """
        blocks, gains, start = self.blocks(), {}, 0
        ends = self.ends if self.ends is not None else range(1, len(self.units) + 1)
        for place, end in enumerate(ends):
            hidden = blocks[place - 1].compute if place else 0
            load = blocks[place].load
            for unit in range(start, end):
                if unit not in self.pins and self.units[unit].nbytes:
                    part = self.units[unit].load
                    gains[unit] = max(hidden, load) - max(hidden, load - part), part
            start = end
        return gains

    def cut(self, *, longest: int | None = None, room: int | None = None, overhead: int = 0) -> CostedTask | None:
        """The same in blocks that make its jobs shortest; None if no cuts keep the limits."""
        ends = balanced_cuts(replace(self, ends=None).blocks(), longest=longest, room=room, overhead=overhead)
        return None if ends is None else replace(self, ends=tuple(ends))


def initial_pins(spec: TaskSpec) -> frozenset[int]:
    """What the user has pinned of a task described by blocks."""
    blocks = spec.blocks or ()
    return frozenset(place for place, block in enumerate(blocks) if spec.pinned or block.pinned)


def described(spec: TaskSpec) -> CostedTask:
    """A task whose blocks are given in the description."""
    units = tuple(Block(block.load, block.compute, block.bytes) for block in spec.blocks or ())
    return CostedTask(spec, units, spec.activation_bytes, pins=initial_pins(spec))


def always_bytes(tasks: Sequence[CostedTask], *, keep: bool) -> int:
    """Bytes set aside at all times: of each task, and of the heap in which one job runs and others wait.

    Args:
        tasks: of the set.
        keep: jobs may be preempted, and keep what they carry over the boundary.
    """
    carried = sum(task.carried_bytes for task in tasks) if keep else 0
    heap = max((task.busy_bytes + carried - (task.carried_bytes if keep else 0) for task in tasks), default=0)
    return sum(task.fixed_bytes for task in tasks) + int(heap * _STIRRED)


def burst_of(spec: TaskSpec) -> int:
    """Jobs that may wait at once."""
    if spec.contract is not None:
        return spec.contract.burst
    return 1 + -(-spec.jitter // spec.step)


def slots_of(spec: TaskSpec) -> int:
    """Jobs whose tensors are in shared memory at once: those that wait, one that is told, and one that is read."""
    return burst_of(spec) + 2


def arrival_of(spec: TaskSpec) -> Arrival:
    """The contract by which jobs arrive."""
    if spec.contract is not None:
        return Arrival.token_bucket(spec.contract.burst, spec.contract.period)
    return Arrival(spec.step, spec.jitter)


def priorities(tasks: Sequence[CostedTask]) -> dict[str, int]:
    """Those given; the others by deadline, the shortest first, below and beside none that was given."""
    order = sorted(tasks, key=lambda task: (task.spec.relative_deadline, task.name), reverse=True)
    return {
        task.name: task.spec.priority if task.spec.priority is not None else place - len(order)
        for place, task in enumerate(order)
    }


def chain(task: CostedTask, settings: TasksSpec, chunk: int) -> tuple[int, ...]:
    """Worst segments of a job, with what boundaries cost and a prefetch that has to be given up first."""
    lengths = segments(task.blocks(), settings.overhead)
    if prefetches(settings, [task]):
        lengths = (lengths[0] + chunk, *lengths[1:])
    return lengths


def prefetches(settings: TasksSpec, tasks: Sequence[CostedTask]) -> bool:
    """Whether first blocks are loaded ahead: as said; else for models, whose chunks are known."""
    if settings.prefetch is not None:
        return settings.prefetch
    return all(task.spec.blocks is None for task in tasks)


def analysis_task(task: CostedTask, settings: TasksSpec, priority: int, chunk: int) -> Task:
    """As the analysis sees it."""
    lengths = chain(task, settings, chunk)
    made = Task(
        task.name,
        lengths,
        arrival_of(task.spec),
        task.spec.relative_deadline,
        priority,
        background=not task.spec.guaranteed,
    )
    return made.whole() if settings.preemption == "np" else made


def footprint_of(task: CostedTask, settings: TasksSpec, priority: int) -> Footprint:
    """What its jobs hold."""
    level = task.spec.relative_deadline if settings.policy == "edf" else -priority
    return footprint(
        task.name,
        task.blocks(),
        task.activation_bytes,
        level if task.spec.guaranteed else _NOBODY + task.spec.relative_deadline,
        pinned=task.pinned_bytes,
        network=task.network,
    )


def facts_of(task: CostedTask, index: int, priority: int, swap_bytes: int = 0) -> TaskFacts:
    """As policies see it."""
    return TaskFacts.of_blocks(
        task.name,
        index,
        task.blocks(),
        task.spec.relative_deadline,
        task.spec.step,
        priority=priority,
        guaranteed=task.spec.guaranteed,
        activation_bytes=task.activation_bytes,
        swap_bytes=swap_bytes,
    )
