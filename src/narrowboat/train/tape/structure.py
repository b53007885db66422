"""A forward and backward pass as numbers: which operator made, read and changed which storage, and what autograd kept.

Nothing here touches torch: a ``Tape`` is made by ``train.measure`` and read by the planner.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from narrowboat.train.tape.facts import Kind

NEVER = 1 << 60

Signature = tuple[str, int, tuple[int, ...]]
"""Of an operator: its name, how many storages it made, and which earlier ones it read."""


@dataclass(slots=True)
class TapeOp:
    """One operator of the forward pass that made or changed a storage.

    Attributes:
        index: its place in the order of such operators.
        name: e.g. ``"aten::convolution"``.
        kind: SAGE's category.
        module: the module that was running, as a path ("layer3.0.conv1"); "" outside of any.
        random: it draws from a random generator.
        created: storages that it made.
        read: storages made by earlier operators that it reads (those it changes included).
        changed: storages made by earlier operators that it writes to.
        outside: for each of its tensors from outside (weights, buffers, inputs), in order: the storage's number.
        outside_changed: numbers of those that it writes to.
        seconds: measured duration; 0 where it was not measured.
        seconds_again: of a replay; None where it takes as long as the first time.
        lasting: storages that it made and that stay for a replay that costs less (``tape.renormal``).
        scratch: bytes that its kernel takes while it runs, beyond what it makes; 0 where that was not measured.
        turnover: all bytes that its kernel takes and gives back while it runs, ``scratch`` and what it makes included.
        call: how to call it alone, to measure that (``measure.kernels``); None where nobody needs to.
    """

    index: int
    name: str
    kind: Kind
    module: str
    random: bool
    created: tuple[int, ...]
    read: tuple[int, ...]
    changed: tuple[int, ...]
    outside: tuple[int, ...]
    outside_changed: tuple[int, ...]
    seconds: float = 0.0
    scratch: int = 0
    turnover: int = 0
    call: Any = None
    seconds_again: float | None = None
    lasting: tuple[int, ...] = ()

    @property
    def replay(self) -> float:
        """Seconds of running it again."""
        return self.seconds if self.seconds_again is None else self.seconds_again

    def paced(self, like: TapeOp, factor: float) -> TapeOp:
        """The operator with the durations of another, times ``factor``."""
        again = None if like.seconds_again is None else like.seconds_again * factor
        return replace(self, seconds=like.seconds * factor, seconds_again=again)


@dataclass(slots=True)
class TapeStorage:
    """One storage made in the forward pass.

    Attributes:
        number: its place in the order of creation.
        nbytes: its bytes.
        creator: the operator that made it.
        last_write: the last operator that wrote to it (the creator, where nothing changed it).
        dies: operators that had run when nothing but autograd held it any more; ``NEVER`` if it outlives the pass.
        saved_at: for each time autograd saved it (or a view): how many operators had run.
        shrinks: bytes it takes when compacted without loss; 0 where it cannot be.
    """

    number: int
    nbytes: int
    creator: int
    last_write: int
    dies: int = NEVER
    saved_at: list[int] = field(default_factory=list)
    shrinks: int = 0


@dataclass(frozen=True, slots=True)
class BackwardEvent:
    """One moment of the backward pass.

    Attributes:
        kind: "need" (a saved storage is asked for), "done" (autograd lets go of what it saved of it),
            "live" (the bytes of gradients and temporaries changed).
        storage: for "need" and "done": which.
        saved_at: for "need" and "done": which saving of it, as in ``TapeStorage.saved_at``.
        live: bytes of gradients (those of parameters apart) and temporaries after the event.
        seconds: since the backward pass began.
        gradients: bytes of parameters' gradients that are there after the event.
        scratch: bytes above ``live`` that the kernel which makes this storage takes while it runs.
        turnover: as of an operator.
        call: as of an operator, with the first storage that it makes.
    """

    kind: str
    storage: int
    saved_at: int
    live: int
    seconds: float = 0.0
    gradients: int = 0
    scratch: int = 0
    turnover: int = 0
    call: Any = None


@dataclass(slots=True)
class Tape:
    """One pass, forward and backward, as it would be if autograd's saved storages cost nothing.

    Attributes:
        ops: the operators, in order.
        storages: by number.
        backward: what happened in the backward pass, in order; empty where it was not run.
        batch: samples in the pass.
        outside_changed: numbers of storages from outside that some operator writes to (running statistics).
        output_bytes: bytes of the loss.
        parameter_gradients: the largest gradient of one parameter, in bytes.
        forward_seconds, backward_seconds: durations of the plain passes; 0 where they were not measured.
        overhead: seconds that writing down a forward pass took beyond it; a pass under a plan takes about as much.
    """

    ops: list[TapeOp]
    storages: list[TapeStorage]
    backward: list[BackwardEvent]
    batch: int
    outside_changed: frozenset[int] = frozenset()
    parameter_gradients: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    overhead: float = 0.0

    def signature(self) -> tuple[Signature, ...]:
        """What has to be equal for a plan of one pass to fit another."""
        return tuple((op.name, len(op.created), op.read) for op in self.ops)

    def with_gradients(self) -> Tape:
        """The pass with the gradients of parameters among what is alive, as they come one by one in the backward."""
        return replace(self, backward=[replace(event, live=event.live + event.gradients) for event in self.backward])

    @property
    def lasting(self) -> frozenset[int]:
        """Storages that no plan drops, as replays need them."""
        return frozenset(number for op in self.ops for number in op.lasting)

    @property
    def saved_bytes(self) -> int:
        """Bytes that the plain step keeps for its backward pass."""
        return sum(storage.nbytes for storage in self.storages if storage.saved_at)
