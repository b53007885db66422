"""What training holds of the process's memory: private resident bytes beyond those that were there without it.

Pages of mapped files (libraries' code, touched when a kernel first runs) are the system's to drop and are left out.
"""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import torch
from torch import nn

from narrowboat.machine.malloc import trim
from narrowboat.machine.memory import private_bytes, process_memory
from narrowboat.train.measure.kernels import Kernels
from narrowboat.train.measure.study import study
from narrowboat.train.random_state import RandomState
from narrowboat.train.static import batch_bytes, model_bytes
from narrowboat.train.weights import TrainingWeights


class Footprint:
    """Of one training step.

    Args:
        model, optimizer: what it trains.
        weights: of the model, on storage; None where they are in memory.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, weights: TrainingWeights | None) -> None:
        self._model, self._optimizer, self._weights = model, optimizer, weights
        self._base: int | None = None
        self._settled = self._data = 0

    def begin(self, inputs: Any, targets: Any) -> None:
        """Before anything is measured with such a batch: take the baseline, if there is none yet."""
        if self._base is not None:
            return
        _load_libraries()
        held = model_bytes(self._model, self._optimizer) + batch_bytes(inputs, targets)
        if self._weights is not None:
            held += self._weights.resident_bytes
        self._base = max(0, _settled() - held)
        self._data = process_memory().data - held

    @property
    def base(self) -> int:
        """Private bytes of the process without the training: of libraries, and what else its user holds."""
        return self._base or 0

    def held(self) -> int:
        """Bytes that training holds now."""
        return max(0, private_bytes() - self.base)

    def addresses(self) -> int:
        """Bytes of private address space that it holds now, touched or not."""
        return max(0, process_memory().data - self._data)

    def peak(self) -> int:
        """The most that it held since the mark was reset."""
        memory = process_memory()
        return max(0, memory.hwm - memory.file - memory.shmem - self.base)

    def before_measuring(self) -> None:
        """Remember what there is."""
        self._settled = _settled()

    def left_behind(self) -> int:
        """Bytes that are there since ``before_measuring``: compiled kernels, tapes, what Python keeps for itself."""
        return max(0, _settled() - self._settled)


def _settled() -> int:
    gc.collect()
    trim(refill=False)
    return private_bytes()


@cache
def _load_libraries() -> None:
    """Measure next to nothing once: what torch loads for that belongs to the process, not to the training."""
    random = RandomState()
    model = nn.Linear(1, 1)

    def forward(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (model(inputs) - targets).square().mean()

    few = torch.zeros(2, 1)
    made = study(model, forward, few, few)
    made.time(model, forward, few, few, (2,))
    Kernels().load()
    random.restore()
