"""SAGE's techniques by name, each of which can be switched off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from narrowboat.errors import UsageError
from narrowboat.train.measure.chain import Techniques


@dataclass(frozen=True, slots=True)
class Switches:
    """Which techniques may be used.

    Attributes:
        planner: those that the planner chooses among: recompute, reduce, compact, spill.
        accumulate: micro-batches.
        fuse: leaf blocks through torch.compile; results differ by roundings, so it is off unless asked for.
        low_memory: a linear layer and its cross entropy in chunks; differs by roundings too.
        state: optimizer state, gradients and weights on storage.
    """

    NAMES: ClassVar[tuple[str, ...]] = (
        "recompute",
        "reduce",
        "compact",
        "spill",
        "accumulate",
        "state",
        "fuse",
        "low_memory",
    )
    ROUNDING: ClassVar[tuple[str, ...]] = ("fuse", "low_memory")

    planner: Techniques
    accumulate: bool
    fuse: bool
    low_memory: bool
    state: bool

    @classmethod
    def of(cls, names: Iterable[str] | None) -> Switches:
        """From the names of those allowed; None for all that keep every bit.

        Raises:
            UsageError: no such technique.
        """
        chosen = (
            set(cls.NAMES) - set(cls.ROUNDING) if names is None else {names} if isinstance(names, str) else set(names)
        )
        unknown = sorted(chosen - set(cls.NAMES))
        if unknown:
            raise UsageError(f"techniques={unknown}: choose among {', '.join(cls.NAMES)}")
        return cls(
            planner=Techniques(**{name: name in chosen for name in ("recompute", "reduce", "compact", "spill")}),
            accumulate="accumulate" in chosen,
            fuse="fuse" in chosen,
            low_memory="low_memory" in chosen,
            state="state" in chosen,
        )
