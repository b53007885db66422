"""An optimizer stepped bucket by bucket: the parameters of a bucket are stepped, their gradients freed, then the next.

Here the state is in memory; :class:`~narrowboat.train.state.optimizer.StoredOptimizer` keeps it on storage.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from narrowboat.errors import TrainingError
from narrowboat.train.state.predict import nbytes_of, state_tensors
from narrowboat.train.state.stepping import (
    Changes,
    all_parameters,
    apply_changes,
    check_per_parameter,
    run_post_hooks,
    run_pre_hooks,
    step_some,
)

Bucket = tuple[torch.Tensor, ...]


def partition(parameters: Sequence[torch.Tensor], weights: Sequence[int], limit: int) -> tuple[Bucket, ...]:
    """Neighbours put together as long as they weigh no more than ``limit``; what alone weighs more stays alone."""
    buckets: list[list[torch.Tensor]] = []
    filled = 0
    for parameter, weight in zip(parameters, weights, strict=True):
        if not buckets or filled + weight > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(parameter)
        filled += weight
    return tuple(tuple(bucket) for bucket in buckets)


class BucketedOptimizer:
    """Steps any optimizer whose update is per parameter in parts, with the bits of its own whole step.

    A whole step is ``begin()``, ``step_bucket(i)`` for each bucket in any order, ``finish()``; ``step()`` does all
    three. The optimizer's step hooks run once per whole step, in ``begin`` and ``finish``.

    Args:
        optimizer: the real one; schedulers and settings go on working through it.
        bucket_bytes: the most that a bucket's state, and its gradients, may take; a larger parameter is one bucket.

    Attributes:
        optimizer: as given.
        buckets: the parameters of each bucket, in the optimizer's order.
        stepped: numbers of the buckets stepped since ``begin``: once there is one the step cannot be repeated.

    Raises:
        TrainingError: the optimizer's update is not per parameter.
    """

    def __init__(self, optimizer: Optimizer, *, bucket_bytes: int) -> None:
        check_per_parameter(optimizer)
        self.optimizer = optimizer
        self._parameters = all_parameters(optimizer)
        self._predicted = state_tensors(optimizer)
        weights = [max(nbytes_of([p]), nbytes_of(self._predicted[p])) for p in self._parameters]
        self.buckets = partition(self._parameters, weights, bucket_bytes)
        self.stepped: set[int] = set()
        self._changes: Changes = {}
        self._stepping = False

    @property
    def stepping(self) -> bool:
        """Whether a whole step has begun and is not finished."""
        return self._stepping

    def begin(self) -> None:
        """A whole step begins.

        Raises:
            TrainingError: one has begun already, or the optimizer has got or lost parameters.
        """
        if self._stepping:
            raise TrainingError("a step has begun already; finish it first")
        now = all_parameters(self.optimizer)
        if len(now) != len(self._parameters) or any(a is not b for a, b in zip(now, self._parameters, strict=True)):
            raise TrainingError(
                "the optimizer's parameters have changed since its buckets were made; make new ones "
                "(state on storage: release() it first)"
            )
        run_pre_hooks(self.optimizer)
        self.stepped, self._changes, self._stepping = set(), {}, True

    def prefetch(self, index: int) -> None:
        """The bucket is stepped soon; begin to fetch what that needs."""

    def step_bucket(self, index: int) -> None:
        """Step the bucket's parameters that have a gradient, and free their gradients.

        Raises:
            TrainingError: no step has begun, or the bucket was stepped already.
        """
        if not self._stepping or index in self.stepped:
            raise TrainingError(f"bucket {index} is not to be stepped now; begin() a step first, and step it once")
        bucket = self.buckets[index]
        if all(parameter.grad is None for parameter in bucket):
            return
        self.stepped.add(index)
        self._changes.update(self._step(index))
        for parameter in bucket:
            parameter.grad = None

    def _step(self, index: int) -> Changes:
        return step_some(self.optimizer, self.buckets[index])

    def finish(self) -> None:
        """The whole step is done.

        Raises:
            TrainingError: no step has begun.
        """
        if not self._stepping:
            raise TrainingError("no step has begun")
        apply_changes(self.optimizer, self._changes)
        self._stepping = False
        run_post_hooks(self.optimizer)

    def give_up(self) -> None:
        """The step that has begun is not made.

        Raises:
            TrainingError: some of it was made already.
        """
        self._stepping = False
        if self.stepped:
            raise TrainingError(
                f"{len(self.stepped)} of {len(self.buckets)} parts of the model were stepped before the step failed: "
                "load the last saved state of model and optimizer before going on"
            )

    def step(self) -> None:
        """A whole step with the gradients that the parameters have; they are freed part by part."""
        self.begin()
        try:
            self._step_all()
        except BaseException:
            self._stepping = False
            raise
        self.finish()

    def _step_all(self) -> None:
        due = [i for i, bucket in enumerate(self.buckets) if any(p.grad is not None for p in bucket)]
        for index, following in itertools.zip_longest(due, due[1:]):
            self.prefetch(index)
            if following is not None:
                self.prefetch(following)
            self.step_bucket(index)
