"""The optimizer's step within the backward pass, together with accumulation and clipping.

Elsewhere a step within backward goes wrong with several micro-batches (it steps once for each) and excludes clipping
(the norm is not known before the last gradient). Here both decide when a bucket is stepped:

==================  =========================  =====================================================
micro-batch         without clipping           with clipping
==================  =========================  =====================================================
more follow         gradients wait             gradients wait
the last            a bucket is stepped as     gradients wait; ``finish`` takes the norm, then scales
                    soon as it is complete     and steps bucket by bucket
==================  =========================  =====================================================

They wait in ``p.grad``, or on storage in a :class:`~narrowboat.train.state.gradients.GradientStore`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from narrowboat.errors import TrainingError
from narrowboat.train.state.bucketed import BucketedOptimizer
from narrowboat.train.state.gradients import GradientStore


class InBackward:
    """Makes one optimizer step out of one or several backward passes.

    For each micro-batch: ``begin(last=...)``, then one call of ``backward``; after the last, ``finish()``. The result
    has the bits of accumulating in ``p.grad``, ``clip_grad_norm_``, ``optimizer.step()``.

    As soon as a bucket was stepped (:attr:`stepped`) the step cannot be repeated, as its parameters have changed: a
    loop that repeats a step on less memory has to do so before, or not use this.

    Args:
        optimizer: steps the buckets.
        gradients: where gradients wait; made with ``buckets=optimizer.buckets``. In memory by default.
        max_norm: clip to this norm; None for no clipping.
        norm_type: order of that norm.
        error_if_nonfinite: refuse to step on a norm that is not finite.
        clip: the parameters whose norm counts, in order, where the gradients wait in memory; the optimizer's by
            default. A store's norm is over its own parameters.

    Raises:
        TrainingError: the store's buckets are not the optimizer's.
    """

    def __init__(
        self,
        optimizer: BucketedOptimizer,
        *,
        gradients: GradientStore | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        clip: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._optimizer, self._store = optimizer, gradients
        self._max_norm, self._norm_type, self._strict = max_norm, norm_type, error_if_nonfinite
        if gradients is not None and gradients.buckets[: len(optimizer.buckets)] != optimizer.buckets:
            raise TrainingError("the gradients' buckets have to be the optimizer's (buckets=optimizer.buckets)")
        self._bucket_of = {p: i for i, bucket in enumerate(optimizer.buckets) for p in bucket}
        self._parameters = [p for b in (optimizer if gradients is None else gradients).buckets for p in b]
        self._clip = list(clip) if clip is not None else self._parameters
        self._arrived: dict[int, int] = {}
        self._needed: list[int] = []
        self._last = False
        self._begun = False
        self._handles: dict[torch.Tensor, RemovableHandle] = {}

    @property
    def stepped(self) -> bool:
        """Whether some parameters have been stepped since ``begin``: the step cannot be repeated."""
        return bool(self._optimizer.stepped) and self._begun

    def begin(self, last: bool) -> None:
        """A backward pass follows.

        Args:
            last: no other micro-batch follows before ``finish``.

        Raises:
            TrainingError: the last backward pass was announced already; or as the optimizer's ``begin``.
        """
        if self._last:
            raise TrainingError("the last micro-batch was announced already; finish() the step, or abandon() it")
        if not self._begun:
            self._optimizer.stepped = set()
        elif self._store is not None:
            self._store.flush()
        self._begun, self._last = True, last
        self._arrived = {}
        # Anew each time: parameters are frozen and thawed in the course of a training.
        self._needed = [sum(p.requires_grad for p in bucket) for bucket in self._optimizer.buckets]
        for parameter in self._parameters:
            if parameter.requires_grad and parameter not in self._handles:
                self._handles[parameter] = parameter.register_post_accumulate_grad_hook(self._complete)
        if self._steps_now:
            self._optimizer.begin()

    @property
    def _steps_now(self) -> bool:
        return self._last and self._max_norm is None

    def _complete(self, parameter: torch.Tensor) -> None:
        if not self._begun:
            return
        index = self._bucket_of.get(parameter)
        if not self._steps_now or index is None:
            if self._store is not None:
                self._store.accept(parameter)
            return
        if self._store is not None:
            self._store.hold(parameter)
        self._arrived[index] = self._arrived.get(index, 0) + 1
        if self._arrived[index] == 1:
            self._optimizer.prefetch(index)
        if self._arrived[index] == self._needed[index]:
            self._step(index)

    def _step(self, index: int) -> None:
        if self._store is None:
            self._optimizer.step_bucket(index)
            return
        record = self._store.read(index)
        try:
            self._optimizer.step_bucket(index)
        finally:
            self._store.release(index, record)

    def finish(self) -> torch.Tensor | None:
        """Step what has not been stepped yet; the whole step is done.

        Returns:
            The norm of the gradients before clipping; None without clipping.

        Raises:
            TrainingError: the last backward pass was not announced; the norm is not finite; as the optimizer's.
            SpillError: the storage failed.
        """
        if not self._last:
            raise TrainingError("begin(last=True) was not called; the step is not complete")
        norm = None
        if self._max_norm is not None:
            norm = self._clipped(self._max_norm)
            self._optimizer.begin()
        due = [i for i in range(len(self._optimizer.buckets)) if i not in self._optimizer.stepped and self._has(i)]
        for index, following in itertools.zip_longest(due, due[1:]):
            for soon in (index, following):
                if soon is not None:
                    self._prefetch(soon)
            self._step(index)
        self._optimizer.finish()
        if self._store is not None:
            self._store.clear()
        self._begun = self._last = False
        return norm

    def _has(self, index: int) -> bool:
        if self._store is not None:
            return self._store.has(index)
        return any(parameter.grad is not None for parameter in self._optimizer.buckets[index])

    def _prefetch(self, index: int) -> None:
        if self._store is not None:
            self._store.prefetch(index)
        self._optimizer.prefetch(index)

    def _clipped(self, max_norm: float) -> torch.Tensor:
        if self._store is not None:
            return self._store.clip(max_norm, self._norm_type, error_if_nonfinite=self._strict)
        try:
            return torch.nn.utils.clip_grad_norm_(
                self._clip, max_norm, self._norm_type, error_if_nonfinite=self._strict
            )
        except RuntimeError as error:
            raise TrainingError(f"the gradients cannot be clipped: {error}") from error

    def abandon(self) -> None:
        """The step is not made: forget all gradients.

        Raises:
            TrainingError: some buckets were stepped already.
        """
        self._begun = self._last = False
        if self._store is not None:
            self._store.clear()
        for parameter in self._clip:
            parameter.grad = None
        if self._optimizer.stepping:
            self._optimizer.give_up()

    def close(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}
