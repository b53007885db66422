"""The process's memory as what a training budget counts: private resident bytes over a baseline.

The allocator's policies, the trimming of the heap and the limit on data (``RLIMIT_DATA``) are all here; a step whose
memory is a device's leaves the host's allocator alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from narrowboat.machine.data_limit import data_limit
from narrowboat.machine.malloc import MallocPolicy, set_malloc_policy
from narrowboat.machine.memory import memory_limits, reset_peak
from narrowboat.machine.whole_heap import STRETCH, give_back, open_whole_heap
from narrowboat.stream.auto import memory_pressure
from narrowboat.train.footprint import Footprint
from narrowboat.train.heap_guard import HeapGuard, NoHeap
from narrowboat.train.measure.clock import HOST, Clock
from narrowboat.train.measure.study import tidy_heap
from narrowboat.train.plan import TrainPlan
from narrowboat.train.static import StaticBytes
from narrowboat.train.weights import TrainingWeights

_SMALL_PLAN = 16 << 20  # bytes of activations
_ENFORCED = 256 << 20  # beyond the plan, before an allocation is refused: threads' heaps, libraries


class HostMemory:
    """See ``memory.MeasuredMemory``.

    Args:
        model, optimizer: what is trained.
        weights: of the model, on storage; None where they are in memory.
        enforce: refuse allocations that go far beyond the plan.
        start_threads: starts those that a step will need; their stacks count as data.
    """

    on_host = True
    clock: Clock = HOST
    slack = workspace = 0

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        weights: TrainingWeights | None,
        *,
        enforce: bool,
        start_threads: Callable[[], None],
    ) -> None:
        self._model, self._enforce, self._start_threads = model, enforce, start_threads
        self._footprint = Footprint(model, optimizer, weights)
        self._policy: MallocPolicy | None = None

    def begin(self, inputs: Any, targets: Any) -> None:
        """See ``MeasuredMemory``."""
        self._footprint.begin(inputs, targets)

    def held(self) -> int:
        """See ``MeasuredMemory``."""
        return self._footprint.held()

    def peak(self) -> int:
        """See ``MeasuredMemory``."""
        return self._footprint.peak()

    def reserved_peak(self) -> int:
        """See ``MeasuredMemory``; what the heap keeps is in ``peak`` here."""
        return 0

    def reset_peak(self) -> None:
        """See ``MeasuredMemory``."""
        reset_peak()

    def before_measuring(self) -> None:
        """See ``MeasuredMemory``."""
        self._footprint.before_measuring()

    def left_behind(self) -> int:
        """See ``MeasuredMemory``."""
        return self._footprint.left_behind()

    def spare(self, static: StaticBytes) -> int:
        """See ``MeasuredMemory``."""
        return memory_limits().available + static.weights + static.buffers + static.batch

    def could_hold(self) -> tuple[int, float]:
        """See ``MeasuredMemory``; limits of address space count what is held of that, touched or not."""
        held, addresses = self._footprint.held(), self._footprint.addresses()
        rooms = memory_limits().headrooms().items()
        spare = min(room + (max(addresses, held) if name.startswith("RLIMIT") else held) for name, room in rooms)
        return spare, memory_pressure()

    def tidy(self) -> None:
        """See ``MeasuredMemory``."""
        tidy_heap()

    def give_back(self) -> None:
        """See ``MeasuredMemory``."""
        give_back()

    @contextmanager
    def guarded(self, plan: TrainPlan, budget: int) -> Iterator[HeapGuard]:
        """See ``MeasuredMemory``."""
        self._tighten(plan)
        budget = min(budget, plan.budget)
        heap = NoHeap() if self._policy is MallocPolicy.STRICT else None
        ceiling = budget + _ENFORCED if self._enforce else None
        with self._limited(plan):
            yield HeapGuard(self._footprint.base, budget, ceiling, still=plan.static.still, heap=heap)

    def _tighten(self, plan: TrainPlan) -> None:
        """Have the allocator keep what the guard gives back; for a few MiB of activations, have it keep nothing.

        Small tensors are cleared sooner than a heap full of huge pages is given back.
        """
        wanted = MallocPolicy.STRICT if plan.activations < _SMALL_PLAN else MallocPolicy.GUARDED
        if plan.step is None or wanted is self._policy:
            return
        done = open_whole_heap() if wanted is MallocPolicy.GUARDED else set_malloc_policy(wanted)
        self._policy = wanted if done else None

    def _limited(self, plan: TrainPlan) -> AbstractContextManager[Any]:
        if not self._enforce:
            return nullcontext()
        self._start_threads()
        static = plan.static
        return data_limit(plan.predicted_peak - static.weights - static.buffers - static.batch + _ENFORCED + STRETCH)

    def close(self) -> None:
        """See ``MeasuredMemory``."""
        if self._policy is not None:
            set_malloc_policy(MallocPolicy.DEFAULT)
            self._policy = None
