"""The memory that a training budget is a number of bytes of: the process's, or a device's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from narrowboat.train.measure.clock import Clock
from narrowboat.train.plan import TrainPlan
from narrowboat.train.static import StaticBytes
from narrowboat.train.tape.frames import Takes


class Guard(Protocol):
    """Looks after one step's passes."""

    @property
    def watches(self) -> bool:
        """Whether ``before`` has to be told of every operator."""
        ...

    def before(self, takes: Takes) -> None:
        """So much is about to be taken."""
        ...

    def end(self, nbytes: int) -> None:
        """The passes are over; so many bytes are taken for the optimizer's step."""
        ...


class MeasuredMemory(Protocol):
    """Of one training step: how much it holds, how much it may, and what keeps it from taking more.

    Attributes:
        on_host: it is the process's, with a heap that has to be trimmed and an address space that can be limited.
        clock: of what computes in it.
        slack: bytes that its allocator takes beside tensors.
        workspace: bytes that libraries take for themselves, as far as known in advance.
    """

    on_host: bool
    clock: Clock
    slack: int
    workspace: int

    def begin(self, inputs: Any, targets: Any) -> None:
        """Before anything is measured with such a batch: take the baseline, if there is none yet."""
        ...

    def held(self) -> int:
        """Bytes that training holds now."""
        ...

    def peak(self) -> int:
        """The most that it held since ``reset_peak``."""
        ...

    def reserved_peak(self) -> int:
        """The most that the allocator took for it since then, freed tensors that it keeps included; 0 if unknown."""
        ...

    def reset_peak(self) -> None:
        """Forget what was held before."""
        ...

    def before_measuring(self) -> None:
        """Remember what there is."""
        ...

    def left_behind(self) -> int:
        """Bytes that are there since ``before_measuring``."""
        ...

    def spare(self, static: StaticBytes) -> int:
        """Bytes that training could hold in all, if others take no more than now.

        Args:
            static: of which weights, buffers and the batch are there.
        """
        ...

    def could_hold(self) -> tuple[int, float]:
        """Bytes as in ``spare``, by what is held now; and the percentage of time in which tasks wait for memory."""
        ...

    def tidy(self) -> None:
        """Between things that are tried: give back what freed tensors left."""
        ...

    def give_back(self) -> None:
        """After a step that was given up."""
        ...

    def guarded(self, plan: TrainPlan, budget: int) -> AbstractContextManager[Guard]:
        """The passes of a plan run inside; going far beyond it is an error that can be caught."""
        ...

    def close(self) -> None:
        """Leave the allocator as it was found."""
        ...
