"""What one kind of batch costs a model: tapes at any number of samples, with durations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from narrowboat.errors import NarrowboatError
from narrowboat.machine.data_limit import is_out_of_memory
from narrowboat.machine.malloc import trim
from narrowboat.train.failures import failure_of
from narrowboat.train.measure.clock import HOST, Clock
from narrowboat.train.measure.fake import fake_walk
from narrowboat.train.measure.fit import alike, at_batch, with_times
from narrowboat.train.measure.kernels import Kernels
from narrowboat.train.measure.meter import walk
from narrowboat.train.measure.real import real_walk, untouched
from narrowboat.train.micro_batch import batch_size, copied, rows
from narrowboat.train.tape.facts import Kind
from narrowboat.train.tape.structure import Tape

log = logging.getLogger("narrowboat")
Forward = Callable[[Any, Any], torch.Tensor]

# Only the ratios matter, and only where nothing could be timed: a contraction does some 30 operations per byte.
_SECONDS_PER_BYTE = {Kind.MAP: 2e-10, Kind.REDUCE: 3e-10, Kind.OTHER: 5e-10, Kind.CONTRACT: 3e-9}
_TIMED = (2, 8)  # samples of the two passes that are timed


def tidy_heap() -> None:
    """Of the host: give back what freed tensors left."""
    trim(refill=False)


@dataclass(slots=True)
class Study:
    """The measured passes of one model, loss and kind of batch.

    Attributes:
        batch: samples in the batch that was given; 1 where no dimension of it counts samples.
        small, large: tapes of two sizes; the same tape where the batch cannot be resized.
        source: "fake tensors", or why real samples were used.
        fixed: seconds of a pass that do not depend on the number of samples, and ``per_sample``: those that do.
        timed: whether durations were measured.
        clock: of what runs the passes.
        tidy: gives back what freed tensors left, between things that are tried.
    """

    batch: int
    small: Tape
    large: Tape
    source: str
    fixed: float = 0.0
    per_sample: float = 0.0
    timed: bool = False
    clock: Clock = HOST
    tidy: Callable[[], None] = tidy_heap
    _resize: Callable[[int], Tape] | None = None
    _times: Tape | None = None
    _kernels: Kernels = field(default_factory=Kernels)

    @property
    def room(self) -> int:
        """Bytes that a kernel's tensors may take for it to be tried; may be set."""
        return self._kernels.limit

    @room.setter
    def room(self, nbytes: int) -> None:
        self._kernels.limit = nbytes

    def tape(self, batch: int) -> Tape:
        """The pass of ``batch`` samples, with durations."""
        fits = alike(self.small, self.large) and self.small.batch != self.large.batch
        # A single sample lies in memory in another order, and layers spare themselves copies then.
        if fits and (batch > 1 or self._resize is None):
            tape = at_batch(self.small, self.large, batch)
        elif batch == self.large.batch or self._resize is None:
            tape = self.large
        else:
            tape = self._resize(batch)
        tape = self._kernels.with_scratch(tape)
        if self._times is None or self._times.signature() != tape.signature():
            tape = _guessed(tape)
            return _rescaled(tape, self.seconds(batch) / max(3 * tape.forward_seconds, 1e-9)) if self.timed else tape
        tape = with_times(tape, self._times)
        return _rescaled(tape, self.seconds(batch) / max(tape.forward_seconds + tape.backward_seconds, 1e-9))

    def seconds(self, batch: int) -> float:
        """Measured, or guessed, seconds of a plain pass over ``batch`` samples."""
        return self.fixed + self.per_sample * batch

    def timed_as(self, other: Study) -> Study:
        """This study with the seconds of another, of the same work in other operators."""
        self.fixed, self.per_sample, self.timed = other.fixed, other.per_sample, other.timed
        return self

    def time(self, model: nn.Module, forward: Forward, inputs: Any, targets: Any, sizes: tuple[int, ...]) -> None:
        """Run real passes over so many samples, and take their durations."""
        walks = []
        for size in sizes:
            self.tidy()  # what was tried before left its holes
            try:
                walks.append(real_walk(model, forward, inputs, targets, size, clock=self.clock))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                log.info("no room to time a pass of %d samples: %s", size, error)
                break
        if not walks:
            return
        totals = [walk.forward_seconds + walk.backward_seconds for walk in walks]
        first, last = walks[0], walks[-1]
        if len(walks) > 1 and last.batch > first.batch and totals[-1] > totals[0]:
            self.per_sample = (totals[-1] - totals[0]) / (last.batch - first.batch)
            self.fixed = max(0.0, totals[0] - self.per_sample * first.batch)
        self.per_sample = (totals[-1] - self.fixed) / last.batch
        self._times, self.timed = last, True


def study(
    model: nn.Module,
    forward: Forward,
    inputs: Any,
    targets: Any,
    *,
    clock: Clock = HOST,
    tidy: Callable[[], None] = tidy_heap,
) -> Study:
    """Measure a pass without computing it; on a few real samples where fake tensors cannot go.

    Args:
        model: stays as it is.
        forward: gives the loss (a scalar with a graph) of inputs and targets.
        inputs, targets: one batch.
        clock, tidy: see ``Study``.
    """
    made = _studied(model, forward, inputs, targets, clock)
    made.clock, made.tidy = clock, tidy
    return made


def _studied(model: nn.Module, forward: Forward, inputs: Any, targets: Any, clock: Clock) -> Study:
    batch = batch_size(inputs, targets)
    try:
        # What grows with the square of the samples lies below the line between the two, so it is never underestimated.
        large = fake_walk(model, forward, inputs, targets, max(batch, 1))
        small = fake_walk(model, forward, inputs, targets, 2) if batch > 2 else large
        real = _forward_on_real(model, forward, inputs, targets, small.batch)
        # A model may ask whether its tensors are fake, and take another way then (the masks of transformers).
        if real.signature() != small.signature():
            raise _OtherWayError("the model does other things with them")
        more = _KernelsOwn(small, real)
        if more and batch > small.batch:
            size = min(batch, 8 * small.batch)  # they grow in steps of some samples
            fake = fake_walk(model, forward, inputs, targets, size, backward=False)
            more = _KernelsOwn(small, real, fake, _forward_on_real(model, forward, inputs, targets, size))

        def resize(count: int) -> Tape:
            return more.enlarged(fake_walk(model, forward, inputs, targets, count))

        made = Study(max(batch, 1), more.enlarged(small), more.enlarged(large), "fake tensors", _resize=resize)
        return _with_guesses(made)
    except Exception as error:  # fake execution fails in as many ways as there are operators
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        log.info("no pass on fake tensors (%s); measuring on real samples", reason)
    sizes = (2, 4) if batch >= 4 else (batch, batch)
    try:
        small = real_walk(model, forward, inputs, targets, sizes[0], clock=clock)
    except NarrowboatError:
        raise
    except Exception as error:
        raise failure_of(error, f"tried on {sizes[0]} of its {batch} samples" if sizes[0] < batch else "") from error
    large = real_walk(model, forward, inputs, targets, sizes[1], clock=clock) if sizes[1] != sizes[0] else small
    made = Study(
        max(batch, 1),
        small,
        large,
        f"real samples ({reason})",
        _resize=lambda count: real_walk(model, forward, inputs, targets, count, clock=clock),
    )
    return _with_guesses(made)


class _OtherWayError(Exception):
    """A pass on fake tensors is not the pass on real ones."""


def _forward_on_real(model: nn.Module, forward: Forward, inputs: Any, targets: Any, batch: int) -> Tape:
    """A forward pass over a few samples that keeps nothing for a backward."""
    size = batch_size(inputs, targets)
    few = [copied(rows(tree, size, 0, batch)) for tree in (inputs, targets)]
    with untouched(model):
        return walk(model, lambda: forward(*few), [], batch, backward=False)


class _KernelsOwn:
    """Bytes by which storages are larger than fake ones: workspaces, whose size only the kernel knows.

    Args:
        fake, real: a pass of one size, and ``fake_more``, ``real_more`` of another: what they tell is a + b n.
    """

    def __init__(self, fake: Tape, real: Tape, fake_more: Tape | None = None, real_more: Tape | None = None) -> None:
        first, second = _excess(fake, real), {}
        if fake_more is not None and real_more is not None and fake_more.signature() == real_more.signature():
            second = _excess(fake_more, real_more)
        self._growth: dict[int, tuple[float, float]] = {}
        for number, nbytes in first.items():
            per_sample = nbytes / fake.batch
            if fake_more is not None and number in second:
                per_sample = max(0.0, (second[number] - nbytes) / (fake_more.batch - fake.batch))
            self._growth[number] = (nbytes - per_sample * fake.batch, per_sample)

    def __bool__(self) -> bool:
        return bool(self._growth)

    def enlarged(self, tape: Tape) -> Tape:
        """A fake pass with these bytes."""
        if not self._growth:
            return tape
        storages = [replace(storage) for storage in tape.storages]
        for number, (fixed, per_sample) in self._growth.items():
            storages[number].nbytes += math.ceil(fixed + per_sample * tape.batch)
        return replace(tape, storages=storages)


def _excess(fake: Tape, real: Tape) -> dict[int, int]:
    pairs = zip(fake.storages, real.storages, strict=True)
    return {theirs.number: theirs.nbytes - ours.nbytes for ours, theirs in pairs if theirs.nbytes > ours.nbytes}


def timing_sizes(batch: int, fits: Callable[[int], bool], *, large: bool = False) -> tuple[int, ...]:
    """Samples of the passes to time for a batch, at most two numbers; none where there is no room.

    Args:
        batch: samples.
        fits: whether there is room for a pass of so many.
        large: on a device that is idle over a few samples, whose passes take as long as it takes to call them.
    """
    shares = (batch // 4, batch // 2, batch) if large else ()
    sizes = sorted({min(max(size, 1), max(batch, 1)) for size in (*_TIMED, *shares)})
    return tuple(size for size in sizes if fits(size))[-2:]


def _with_guesses(made: Study) -> Study:
    tape = _guessed(made.large)
    made.per_sample = (tape.forward_seconds + tape.backward_seconds) / max(tape.batch, 1)
    return made


def _guessed(tape: Tape) -> Tape:
    ops = [
        replace(
            op,
            seconds=_SECONDS_PER_BYTE[op.kind]
            * sum(tape.storages[number].nbytes for number in {*op.created, *op.read, *op.changed}),
        )
        for op in tape.ops
    ]
    forward = sum(op.seconds for op in ops)
    return replace(tape, ops=ops, forward_seconds=forward, backward_seconds=0.0)


def _rescaled(tape: Tape, factor: float) -> Tape:
    return replace(
        tape,
        ops=[op.paced(op, factor) for op in tape.ops],
        backward=[replace(event, seconds=event.seconds * factor) for event in tape.backward],
        forward_seconds=tape.forward_seconds * factor,
        backward_seconds=tape.backward_seconds * factor,
    )
