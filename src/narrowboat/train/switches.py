"""SAGE's techniques by name, each of which can be switched off."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

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
    def _known(cls, names: Any) -> set[str]:
        if not isinstance(names, Iterable):
            raise UsageError(f"techniques={names!r}: give names among {', '.join(cls.NAMES)}")
        given = [names] if isinstance(names, str) else list(names)
        for name in given:
            if name not in cls.NAMES:
                near = difflib.get_close_matches(name, cls.NAMES, n=1) if isinstance(name, str) else []
                hint = f"did you mean {near[0]!r}? There are" if near else "choose among"
                raise UsageError(f"techniques: there is no {name!r}; {hint} {', '.join(cls.NAMES)}")
        return set(given)

    @classmethod
    def of(cls, names: Iterable[str] | None) -> Switches:
        """From the names of those allowed; None for all that keep every bit.

        Raises:
            UsageError: no such technique, or no names.
        """
        chosen = set(cls.NAMES) - set(cls.ROUNDING) if names is None else cls._known(names)
        return cls(
            planner=Techniques(**{name: name in chosen for name in ("recompute", "reduce", "compact", "spill")}),
            accumulate="accumulate" in chosen,
            fuse="fuse" in chosen,
            low_memory="low_memory" in chosen,
            state="state" in chosen,
        )
