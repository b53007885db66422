"""The chain that a training step is planned on: units, their options, and the boundaries between them.

The heterogeneous chain of Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, "Optimal checkpointing for
heterogeneous chains" (ACM TOMS), with several ways to bring a unit's saved tensors back, as Rockmate has them
(Zhao, Le Hellard, Eyraud-Dubois, Gusak and Beaumont, ICML 2023), and with boundaries that may share tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from narrowboat.errors import UsageError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Option:
    """One way to have the saved tensors of a unit back when its backward comes.

    Attributes:
        name: e.g. ``"keep"``, ``"reduced"``, ``"spill"``, ``"compact"``.
        held: bytes held from the unit's forward until its backward beyond its inputs, what the next unit needs
            included: ``|(S_i | B_{i+1}) \\ B_i|``. If it writes: ``|B_{i+1} \\ B_i|`` and what it does not write.
        forward_peak: bytes at the worst moment of the unit's forward, beyond its inputs and what others hold.
        backward_peak: bytes at the worst moment of its backward (saved tensors, gradients, temporaries, what it
            recomputes), beyond its inputs and what others hold.
        forward_extra: seconds beyond the plain forward (packing, writing).
        backward_extra: seconds beyond the plain backward (recomputing, reading).
        spilled: bytes written to storage. An option that writes is not used inside a replay, and until its backward
            the unit itself needs neither inputs nor outputs in memory: its seconds cover all that it reads back.
    """

    name: str
    held: int
    forward_peak: int
    backward_peak: int
    forward_extra: float = 0.0
    backward_extra: float = 0.0
    spilled: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of the forward that is kept or dropped as a whole.

    Attributes:
        name: what a message calls it.
        forward: seconds of its forward.
        backward: seconds of its backward.
        replay: seconds to run its forward again.
        options: how its saved tensors can be had back; the first keeps them all and writes nothing.
        dropped_peak: bytes at the worst moment of a forward that saves nothing, beyond its inputs.
        gradient: bytes of gradients that flow into its inputs' boundary, alive in the backward once everything
            after that boundary is done.
    """

    name: str
    forward: float
    backward: float
    replay: float
    options: tuple[Option, ...]
    dropped_peak: int
    gradient: int


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Units in the order of the forward, and what lives on the boundaries between them.

    The boundary ``B_i`` is the set of tensors made before unit i and needed by it or later. So a tensor on two
    boundaries is on all between them. ``B_0``, what the caller gave, counts as nothing, wherever it is needed.

    Attributes:
        units: the L units.
        carried: int64 of shape (L + 1, L + 1); ``carried[i, j]`` with i < j is the bytes of ``B_j`` that are not in
            ``B_i``. So ``carried[0, j]`` is the size of ``B_j``.
        write: seconds to write a byte of a boundary to storage, None where there is no storage.
        read: seconds to read it back, None where there is no storage.

    Raises:
        UsageError: there are no units, a unit has no option or a first one that writes, or ``carried`` has another
            shape or negative bytes.
    """

    units: tuple[Unit, ...]
    carried: IntArray
    write: float | None = None
    read: float | None = None

    def __post_init__(self) -> None:
        boundaries = len(self.units) + 1
        if boundaries == 1:
            raise UsageError("a chain needs at least one unit")
        for unit in self.units:
            if not unit.options or unit.options[0].spilled:
                raise UsageError(f"unit {unit.name}: its first option must be there and write nothing to storage")
        if self.carried.shape != (boundaries, boundaries) or (np.triu(self.carried, 1) < 0).any():
            raise UsageError(
                f"carried must hold bytes for {boundaries} by {boundaries} boundaries, none negative; "
                f"its shape is {self.carried.shape}"
            )

    @property
    def has_storage(self) -> bool:
        """Whether a boundary can be written to storage."""
        return self.write is not None and self.read is not None

    @property
    def transfer(self) -> float:
        """Seconds to write a byte and to read it back."""
        return (self.write or 0.0) + (self.read or 0.0)

    def gradient_after(self, unit: int) -> int:
        """Bytes of the gradients that wait for a unit's backward; none wait for the last."""
        return self.units[unit + 1].gradient if unit + 1 < len(self.units) else 0

    def carry(self, start: int, stop: int) -> int:
        """Bytes of a boundary that an earlier one, or the same, does not hold."""
        return int(self.carried[start, stop]) if start < stop else 0

    def released(self, before: int, start: int, stop: int) -> int:
        """Bytes that leave memory when ``B_start`` is on storage while ``B_before`` and ``B_stop`` are in memory.

        ``|B_start \\ (B_before | B_stop)|``; what the two others share is in ``B_start`` too, since it lies between.
        """

        def shared(early: int, late: int) -> int:
            return self.carry(0, late) - self.carry(early, late)

        size = self.carry(0, start)
        return max(0, size - shared(start, stop) - shared(before, start) + shared(before, stop))
