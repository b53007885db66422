"""The optimizer's step where weights, gradients and optimizer state are all on storage: one bucket at a time.

Weights and state have two generations each. What a step makes of them counts only when both are committed under the
same number, so whatever ends the process in the middle of a step leaves the last whole step on storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from narrowboat.errors import TrainingError
from narrowboat.train.state import GradientStore, StoredOptimizer
from narrowboat.train.tiers import Tier
from narrowboat.train.weights import TrainingWeights


class StoredUpdate:
    """Gradients and optimizer of a model whose trained weights are on storage; the interface of ``Update``.

    Args:
        model, optimizer: as the user has them.
        tier: where things are.
        folder: for state and gradients.
        weights: the model's weights on storage.
        clip: largest norm; None for no clipping.
        resume: go on from the last whole step in the folder.
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
        resume: bool,
    ) -> None:
        assert weights.stored is not None
        self.tier = tier
        self._weights, self._stored, self._clip = weights, weights.stored, clip
        bucket = tier.bucket
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = StoredOptimizer(optimizer, folder, bucket_bytes=bucket, resume=resume)
        try:
            # After a kill between the two commits one is a step ahead.
            step = min(self._optimizer.commits, self._stored.records.step) if resume else 0
            if resume and step:
                self._optimizer.roll_back(step)
                self._stored.records.roll_back(step)
            self._store = GradientStore(trained, folder, bucket_bytes=bucket, buckets=self._optimizer.buckets)
        except BaseException:
            self._optimizer.close()
            raise
        self._step = step

    @property
    def bytes_written(self) -> int:
        """To storage, so far."""
        return self._optimizer.file.bytes_written + self._store.bytes_written + self._stored.records.bytes_written

    def begin(self, last: bool) -> None:
        """A backward pass follows."""
        self._store.attach()

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
            self._stored.finish_writes()
        except BaseException:
            self._stored.discard()
            raise
        self._step += 1
        self._stored.commit(self._step)
        self._optimizer.commit(self._step)
        self._store.clear()

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
