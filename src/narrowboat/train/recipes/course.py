"""Which samples are trained on in which order: the same for the same seed, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from narrowboat.errors import UsageError


def held_back(samples: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the samples to train on, and of those kept back for validation.

    Args:
        samples: how many there are.
        share: to keep back, in [0, 1); rounded, and at least one is left to train on.
        seed: of the choice.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed)).tolist()
    kept = min(round(samples * share), samples - 1)
    return sorted(order[kept:]), sorted(order[:kept])


@dataclass(frozen=True, slots=True)
class Course:
    """Batches in the order of training; each epoch is shuffled anew.

    Attributes:
        rows: numbers of the samples.
        batch: samples per step; an epoch's last batch may have fewer.
        epochs: how often all are seen; ignored where ``steps`` is given.
        steps: how many in all.
        seed: of the order.
    """

    rows: tuple[int, ...]
    batch: int
    epochs: int = 1
    steps: int | None = None
    seed: int = 0

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        full, rest = divmod(len(self.rows), self.batch)
        # One sample has no statistics of its own: BatchNorm refuses it, and a step with it would be mostly noise.
        return max(1, full + (rest > 1))

    @property
    def total(self) -> int:
        """Steps in all."""
        return self.steps if self.steps is not None else self.epochs * self.per_epoch

    def batches(self, start: int = 0) -> Iterator[tuple[int, list[int]]]:
        """``(number of the step from 1, numbers of its samples)`` of the steps after the first ``start``.

        Raises:
            UsageError: there are none left.
        """
        if start >= self.total:
            raise UsageError(f"{start} of {self.total} steps are made already: give more --epochs or --steps")
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for done in range(start, self.total):
            if done // self.per_epoch != epoch:
                epoch = done // self.per_epoch
                # Of the seed and the epoch only, so that a resumed run goes on with the same order.
                generator = torch.Generator().manual_seed(self.seed + epoch + 1)
                order = torch.tensor(self.rows)[torch.randperm(len(self.rows), generator=generator)]
            first = done % self.per_epoch * self.batch
            yield done + 1, order[first : first + self.batch].tolist()
