"""What happens to gradients and how the optimizer steps: in memory, or with its state and the gradients on storage.

With ``in_backward`` buckets are stepped as soon as their gradients are complete, so gradients are never all there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowboat.train.state import BucketedOptimizer, GradientStore, InBackward, StoredOptimizer
from narrowboat.train.static import StaticBytes
from narrowboat.train.tiers import Tier


class Update:
    """Gradients and optimizer of one tier.

    Args:
        model, optimizer: as the user has them.
        tier: where things are.
        folder: for the tiers that need one.
        clip: largest norm; None for no clipping.
        scaler: a gradient scaler, or None.
        in_backward: step buckets as their gradients come.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        tier: Tier,
        folder: Path | None,
        *,
        clip: float | None,
        scaler: Any,
        in_backward: bool,
    ) -> None:
        self.tier = tier
        self._model = model
        self._optimizer = optimizer
        self._clip = clip
        self._scaler = scaler
        self._stored: StoredOptimizer | None = None
        self._store: GradientStore | None = None
        self._steps: InBackward | None = None
        bucket = tier.bucket
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if tier.name != "memory":
            assert folder is not None
            self._stored = StoredOptimizer(optimizer, folder, bucket_bytes=bucket, temporary=True)
        try:
            if tier.name == "gradients":
                assert self._stored is not None and folder is not None
                self._store = GradientStore(trained, folder, bucket_bytes=bucket, buckets=self._stored.buckets)
            if tier.name == "gradients" or in_backward:
                buckets = self._stored or BucketedOptimizer(optimizer, bucket_bytes=bucket)
                # No norm is larger than this one: nothing is clipped, but everything waits for the last gradient.
                norm = clip if clip is not None or in_backward else math.inf
                self._steps = InBackward(buckets, gradients=self._store, max_norm=norm, clip=trained)
        except BaseException:
            self.close()
            raise

    @property
    def bytes_written(self) -> int:
        """To storage, so far."""
        stored = self._stored.file.bytes_written if self._stored is not None else 0
        return stored + (self._store.bytes_written if self._store is not None else 0)

    @property
    def repeatable(self) -> bool:
        """Whether the step can still be given up."""
        return self._steps is None or not self._steps.stepped

    def begin(self, last: bool) -> None:
        """A backward pass follows."""
        if self._steps is not None:
            self._steps.begin(last)

    def takes(self, static: StaticBytes) -> int:
        """Bytes that ``finish`` takes beside what is there: temporaries, and in the first step the state."""
        made = static.optimizer if self._stored is None and not self._optimizer.state else 0
        return static.temporaries + made

    def finish(self) -> None:
        """All backward passes are done: clip and step."""
        if self._steps is not None:
            self._steps.finish()
            return
        if self._scaler is not None and self._clip is not None:
            self._scaler.unscale_(self._optimizer)
        if self._clip is not None:
            held = [parameter for parameter in self._model.parameters() if parameter.grad is not None]
            torch.nn.utils.clip_grad_norm_(held, self._clip)
        if self._scaler is not None:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            self._optimizer.step()

    def abandon(self) -> None:
        """The step is not made."""
        if self._steps is not None:
            self._steps.abandon()

    @contextmanager
    def gradients_in_memory(self) -> Iterator[None]:
        """For passes whose gradients the caller wants in ``.grad``."""
        steps, self._steps = self._steps, None
        try:
            yield
        finally:
            self._steps = steps

    def close(self, *, restore: bool = True) -> None:
        """Bring the state back into memory, if it is wanted, and take all hooks off."""
        if self._steps is not None:
            self._steps.close()
        if self._store is not None:
            self._store.close()
        if self._stored is not None:
            if restore:
                self._stored.release()
            else:
                self._stored.close()
        self._steps = self._store = self._stored = None
