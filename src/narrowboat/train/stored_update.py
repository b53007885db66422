"""The optimizer's step where weights, gradients and optimizer state are all on storage: one bucket at a time.

Weights and state have two generations each. What a step makes of them counts only when both are committed under the
same number, so whatever ends the process in the middle of a step leaves the last whole step on storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.errors import TrainingError
from narrowboat.train.state import GradientStore, StoredOptimizer
from narrowboat.train.static import StaticBytes
from narrowboat.train.tiers import Tier
from narrowboat.train.update import Update
from narrowboat.train.weights import TrainingWeights


class StoredUpdate:
    """Gradients and optimizer of a model whose trained weights are on storage; the interface of ``Update``.

    Args:
        model, optimizer: as the user has them.
        tier: where things are.
        folder: for state and gradients.
        weights: the model's weights on storage.
        clip: largest norm; None for no clipping.

    Raises:
        TrainingError: the optimizer's update is not per parameter, or its state cannot be kept as bytes.
        SpillError: the folder cannot be used, or is full. Of a run that has no step yet nothing is left behind.
    """

    repeatable = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tier: Tier,
        folder: Path,
        weights: TrainingWeights,
        *,
        clip: float | None,
    ) -> None:
        assert weights.stored is not None
        self.tier = tier
        self._weights, self._stored, self._clip = weights, weights.stored, clip
        records, bucket = weights.stored.records, tier.bucket
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        begun = records.step > 0
        try:
            records.open()  # a disk that is full is met before the first pass
            self._optimizer = StoredOptimizer(
                optimizer,
                folder,
                bucket_bytes=bucket,
                resume=begun,
                generation=records.step if begun else None,
                run=records.run,
                beside=self._commit_weights,
            )
            try:
                self._store = GradientStore(trained, folder, bucket_bytes=bucket, buckets=self._optimizer.buckets)
            except BaseException:
                if begun:
                    self._optimizer.close()
                else:
                    self._optimizer.release(remove=True)
                raise
        except BaseException:
            if not begun:
                records.withdraw()
            raise

    @property
    def bytes_written(self) -> int:
        """To storage, so far."""
        return self._optimizer.file.bytes_written + self._store.bytes_written + self._stored.records.bytes_written

    def begin(self, last: bool) -> None:
        """A backward pass follows."""
        self._store.attach()

    def takes(self, static: StaticBytes) -> int:
        """Bytes that ``finish`` takes beside what is there."""
        return static.temporaries

    def finish(self) -> None:
        """All backward passes are done: clip, step each bucket, and commit."""
        if self._clip is not None:
            self._store.clip(self._clip)
        self._optimizer.begin()
        try:
            for index, bucket in enumerate(self._optimizer.buckets):
                if not self._store.has(index):
                    continue
                with self._stored.tensors([p for p in bucket if isinstance(p, nn.Parameter)]):
                    record = self._store.read(index)
                    try:
                        self._optimizer.step_bucket(index)
                    finally:
                        self._store.release(index, record)
            self._optimizer.finish(commit=False)
            self._optimizer.commit(self._commit_weights(1))
        except BaseException as error:
            self._stored.discard()
            self._optimizer.fail(error)
            raise
        self._store.clear()

    def _commit_weights(self, steps: int = 0) -> int:
        """Commit the weights, after so many more steps; the number under which the optimizer has to follow.

        The weights are first: only what both have counts, and what neither has need not be undone.
        """
        number = self._stored.records.step + 1
        self._stored.commit(number, {"steps": self._stored.steps + steps})
        return number

    def abandon(self) -> None:
        """The step is not made."""
        self._store.clear()

    @contextmanager
    def gradients_in_memory(self) -> Iterator[None]:
        """Refused: the gradients would not fit.

        Raises:
            TrainingError: always.
        """
        raise TrainingError("gradients of a model trained on storage are never all in memory; call the step instead")
        yield

    def close(self, *, restore: bool = True) -> None:
        """Close the files; they keep the last whole step, and nothing is brought back."""
        self._store.detach()
        self._store.close()
        self._optimizer.close()


def update_for(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tier: Tier,
    folder: Path | None,
    weights: TrainingWeights | None,
    *,
    clip: float | None,
    scaler: Any,
    in_backward: bool,
) -> Update | StoredUpdate:
    """What happens to gradients and how the optimizer steps, on one tier.

    Args:
        weights: of the model, on storage; None where they are in memory.
        model, optimizer, tier, folder, clip, scaler, in_backward: see ``Update``.
    """
    if weights is not None and weights.stored is not None:
        assert folder is not None
        return StoredUpdate(model, optimizer, tier, folder, weights, clip=clip)
    return Update(model, optimizer, tier, folder, clip=clip, scaler=scaler, in_backward=in_backward)
