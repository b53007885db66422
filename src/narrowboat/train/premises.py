"""What a training step is planned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from narrowboat.train.measure.chain import Rates, Techniques
from narrowboat.train.measure.study import Study
from narrowboat.train.tiers import Tier


@dataclass(frozen=True, slots=True)
class Premises:
    """What a plan is made from.

    Attributes:
        tiers: where gradients and optimizer state may be, quickest first.
        splittable: why the batch must not be split; "" if it may.
        techniques: what may be used.
        rates: of the machine.
        in_flight: bytes that the spill pool may hold.
        spare: bytes that the machine has for trying kernels that the budget has no room for.
        slack: bytes of the allocator beyond tensors, as measured; 0 before that.
        unsafe: storages whose replay was seen to give other bits.
        accumulate: micro-batches may be used.
        parts: the number of micro-batches, if it is given.
        joint: passes of micro-batches that are all under way at once and meet at each BatchNorm; None where they
            follow each other.
        no_storage: why no activations go to storage, where ``rates`` knows of none.
        no_host: why none go from a device to pinned host memory, where ``rates`` knows of none; "" on the host.
        absent: why techniques are switched off, by their names, where it was not the user who did it.
        heap: what is freed stays resident in a heap that is trimmed within the step.
        notes: what else was not used, and why.
    """

    tiers: tuple[Tier, ...]
    splittable: str = ""
    techniques: Techniques = field(default_factory=Techniques)
    rates: Rates = field(default_factory=Rates)
    in_flight: int = 0
    spare: int = 0
    slack: int = 0
    unsafe: frozenset[int] = frozenset()
    accumulate: bool = True
    parts: int | None = None
    joint: Study | None = None
    no_storage: str = "no folder was given (spill=)"
    no_host: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)
    heap: bool = True
    notes: tuple[str, ...] = ()
