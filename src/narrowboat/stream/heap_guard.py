"""Before steps that take much memory: give the heap's holes back, where the step would not fit beside them.

An allocator that keeps what was freed serves later requests from it, unless no hole is large enough: then the heap
grows, by megabytes at once, although the model needs no more than in the pass before. How much a step takes is known
from the trace. If that much on top of what is held now were over the budget, the holes go back to the system first,
which takes about a millisecond; the pages are faulted in again where they are used again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from narrowboat.machine.malloc import MallocPolicy, trim
from narrowboat.machine.memory import resident_bytes
from narrowboat.profile.use_trace import UseTrace

if TYPE_CHECKING:
    from narrowboat.stream.engine import Engine
    from narrowboat.stream.memory_watch import MemoryWatch

_KEEPS_HOLES = (MallocPolicy.DEFAULT, MallocPolicy.BALANCED)
_WATCHED = 0.5  # steps whose peak is at least this share of the pass's
_SMALL = 256 << 10  # bytes; a trim that gives back less is not worth another one in the same pass
_SPARE = 256 << 10  # bytes by which the kernel's count of pages may be behind


class HeapGuard:
    """Watches the steps of one session's passes.

    Args:
        memory: what the process holds.
        engine: whose steps.

    Attributes:
        trims: times the heap's holes were given back within a pass.
    """

    def __init__(self, memory: MemoryWatch, engine: Engine) -> None:
        self.trims = 0
        self._memory, self._engine = memory, engine
        self._trace: UseTrace | None = None
        self._takes: dict[int, int] = {}
        self._limit = 0
        self._useless = False

    def hook(
        self, trace: UseTrace | None, policy: MallocPolicy, budget: int, alone: bool
    ) -> Callable[[], None] | None:
        """What the engine should call at every step of the pass that begins now; None for nothing.

        Args:
            trace: of the pass.
            policy: in force.
            budget: bytes over the baseline.
            alone: no other session's bytes are among those that the kernel counts.
        """
        blind = self._memory.blind(budget)
        if trace is not self._trace:
            self._trace, self._takes = trace, heavy_steps(trace)
        self._limit, self._useless = self._memory.baseline + budget - _SPARE, False
        if self._takes and alone and policy in _KEEPS_HOLES:
            return self._sample_and_look if blind else self._look
        return self._memory.sample if blind else None

    def _sample_and_look(self) -> None:
        self._memory.sample()
        self._look()

    def _look(self) -> None:
        takes = self._takes.get(self._engine.pos + 1)
        if takes is None or self._useless:
            return
        before = resident_bytes()
        if before + takes <= self._limit:
            return
        trim(refill=False)
        self.trims += 1
        self._useless = before - resident_bytes() < _SMALL


def heavy_steps(trace: UseTrace | None) -> dict[int, int]:
    """The steps near the peak of a pass, each with the bytes it takes on top of what is alive as it begins."""
    if trace is None or len(trace.alive) != len(trace.peaks):
        return {}
    least = _WATCHED * trace.activation_bytes
    return {
        step: peak - alive
        for step, (peak, alive) in enumerate(zip(trace.peaks, trace.alive, strict=True))
        if peak >= least and peak - alive >= _SMALL
    }
