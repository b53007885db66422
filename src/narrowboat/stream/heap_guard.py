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

# The policies that keep what was freed; the strict one gives everything back at once.
_WATCHED = frozenset(MallocPolicy) - {MallocPolicy.STRICT}
_SMALL = 256 << 10  # bytes that a step takes, or a trim gives back, which are not worth one
_SPARE = 256 << 10  # bytes by which the kernel's count of pages may be behind


class HeapGuard:
    """Watches the steps of one session's passes.

    Args:
        memory: what the process holds.
        engine: whose steps.

    Attributes:
        allowed: bytes over the baseline that the steps are kept within; None for the budget.
        trims: times the heap's holes were given back within a pass.
    """

    def __init__(self, memory: MemoryWatch, engine: Engine) -> None:
        self.allowed: int | None = None
        self.trims = 0
        self._memory, self._engine = memory, engine
        self._of: tuple[UseTrace | None, MallocPolicy] | None = None
        self._takes: dict[int, int] = {}
        self._limit = 0
        self._left = 0

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
        if self._of is None or self._of[0] is not trace or self._of[1] is not policy:
            self._of = trace, policy
            self._takes = heavy_steps(trace) if policy in _WATCHED else {}
        self._limit = self._memory.baseline + (budget if self.allowed is None else self.allowed) - _SPARE
        self._left = 0
        if self._takes and alone:
            return self._sample_and_look if blind else self._look
        return self._memory.sample if blind else None

    def _sample_and_look(self) -> None:
        self._memory.sample()
        self._look()

    def _look(self) -> None:
        takes = self._takes.get(self._engine.pos + 1)
        if takes is None:
            return
        held = resident_bytes()
        # What the last trim could not give back, the next one cannot either.
        if held + takes > self._limit and held - self._left >= _SMALL:
            trim(refill=False)
            self.trims += 1
            self._left = resident_bytes()


def heavy_steps(trace: UseTrace | None) -> dict[int, int]:
    """The steps of a pass that take memory worth a trim, each with the most bytes it may take."""
    if trace is None:
        return {}
    return {step: fresh for step, fresh in enumerate(trace.fresh) if fresh >= _SMALL}
