"""Trained weights on storage: loaded for the optimizer one bucket at a time, written back as the next generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.arena.standin import is_standin, slot_of
from narrowboat.errors import NarrowboatError, TrainingError
from narrowboat.train.weights.records import WeightRecords
from narrowboat.train.weights.standins import LazySlot

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from narrowboat.train.weights.window import Window


class StoredParameters:
    """The parameters that are trained while their weights are on storage.

    Until a weight is first stepped it is read from the weights file; from then on from its record here. What the
    optimizer makes counts from ``commit`` on: a kill leaves the last whole step.

    Args:
        folder: ``weights.records`` and ``weights.json`` are in it, unless temporary; made when they are first needed.
        weights: in the model's order.
        file_number: the reader's number of the records.
        resume: go on from the last commit, if there is one.
        generation: number of the commit to go on from, which the caller has checked; see ``BucketFile``.
        temporary: the records have no name and go with this process.

    Attributes:
        records: the weights at rest; ``records.bytes_written`` is the wear, ``records.open()`` makes the files.
        window: where they are while they are used.

    Raises:
        SpillError, UsageError, TrainingError: as for ``BucketFile``.
    """

    window: Window

    def __init__(
        self,
        folder: str | Path,
        weights: Sequence[Weight],
        file_number: int,
        *,
        resume: bool,
        generation: int | None = None,
        temporary: bool,
    ) -> None:
        self._weights = list(weights)
        self._known = set(self._weights)
        self._writes: list[Future[None]] = []
        self._written: set[Weight] = set()
        self._failed: NarrowboatError | None = None
        # One thread, which begins with the first write.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="narrowboat-weights")
        self.file_number = file_number
        sizes = {weight.name: weight.entry.nbytes for weight in weights}
        told = [[weight.name, list(weight.entry.shape), str(weight.entry.dtype)] for weight in weights]
        self.records = WeightRecords(
            folder,
            "weights",
            sizes,
            fingerprint=repr(told),
            resume=resume,
            generation=generation,
            temporary=temporary,
            generations=1 if temporary else 2,
            deferred=True,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps that the last commit holds, all runs together."""
        return int(self.records.extra.get("steps", self.records.step))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameter objects, tied ones once."""
        return [slot.tensor for weight in self._weights for slot in weight.slots]  # type: ignore[misc]

    def __contains__(self, weight: Weight) -> bool:
        """Whether the weight is one of these."""
        return weight in self._known

    def take_gradients(self, put: Callable[[nn.Parameter, torch.Tensor], None]) -> list[RemovableHandle]:
        """Call ``put(parameter, gradient)`` as soon as a backward pass has a parameter's gradient; it is not kept.

        Returns:
            Handles; ``remove()`` them to have gradients stay in ``.grad`` again.
        """

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None and isinstance(parameter, nn.Parameter)
            put(parameter, gradient)

        return [parameter.register_post_accumulate_grad_hook(take) for parameter in self.parameters]

    @contextmanager
    def tensors(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within the context these parameters are ordinary tensors in memory, for the optimizer to step.

        The objects stay the same. They have no ``.grad`` of their own when the context begins, and keep the one they
        had before it for after. What they are at the end is written back; if the context fails, nothing is.
        Parameters that are not on storage here are left alone.

        Raises:
            BudgetError: the window cannot hold them together: use smaller buckets.
            TrainingError: somebody else holds on to a parameter's insides (a graph that is still alive).
            SpillError: the storage failed, now or since the call before: writing goes on behind the caller's back.
        """
        found = dict.fromkeys(slot_of(p) for p in parameters if is_standin(p))
        slots = [slot for slot in found if isinstance(slot, LazySlot) and slot.weight in self._known]
        weights = [slot.weight for slot in slots]
        if not slots:
            yield
            return
        if not self._written.isdisjoint(weights):
            self.finish_writes()
        try:
            with self.window.touching(weights):
                try:
                    for slot in slots:
                        self._put_in(slot)
                    yield
                finally:
                    for slot in slots:
                        _take_out(slot)
                self.finish_writes()  # those of the bucket before: one is on its way at a time
                self._write(weights)
        except BaseException:
            self.window.drop(weights)
            raise

    def finish_writes(self) -> None:
        """Wait until what was stepped is written.

        Raises:
            SpillError: it could not be; ``discard`` what was stepped since the last commit.
        """
        if not self._writes and self._failed is None:
            return
        writes, self._writes = self._writes, []
        written, self._written = self._written, set()
        wait(writes)
        self.window.let_go(written)
        failed, self._failed = self._failed, None
        for write in writes:
            write.result()
        if failed is not None:
            raise failed

    def commit(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """What was stepped since the last commit is what counts from now on; see ``BucketFile.commit``.

        Raises:
            SpillError: the storage failed; the last commit still counts: ``discard`` what was stepped since.
        """
        self.finish_writes()
        self.records.commit(step, extra)

    def discard(self) -> None:
        """Forget what was stepped since the last commit."""
        with suppress(NarrowboatError):
            self.finish_writes()
        self.records.discard()
        self.window.drop(self._weights)

    def close(self) -> None:
        """Close the records; what was not committed is lost."""
        with suppress(NarrowboatError):
            self.finish_writes()
        self._writer.shutdown()
        self.records.close()

    def use(self, window: Window) -> None:
        """The weights are in ``window`` while they are used."""
        self.window = window
        window.on_pressed = self._finish_quietly

    def _finish_quietly(self) -> None:
        try:
            self.finish_writes()
        except NarrowboatError as error:
            self._failed = error

    def _write(self, weights: list[Weight]) -> None:
        """Begin to write from where the weights lie in the window, where they stay until that is done."""
        self.window.hold(weights)
        self._written = set(weights)
        for weight in weights:
            place = self.window.place_of(weight)
            self._writes.append(self._writer.submit(self.records.write_from, weight.name, weight.entry, place))

    def _put_in(self, slot: LazySlot) -> None:
        slot.bind(self.window.fresh_view(slot.weight))
        try:
            slot.put_in()
        except RuntimeError as error:
            raise TrainingError(
                f"weight {slot.weight.name!r} cannot be stepped, because something still refers to it (a graph that "
                f"was kept with retain_graph=True, or a loss that is still held): {str(error).splitlines()[0]}"
            ) from error


def _take_out(slot: LazySlot) -> None:
    """Let the model see the stand-in again. Views that somebody kept get memory of their own."""
    if slot.other is None:
        return
    slot.take_out()
    if slot.shared:
        slot.rescue()
    slot.unbind()
    # A graph made before the step must not be gone through after it, as in training in memory.
    torch.autograd.graph.increment_version(slot.tensor)
