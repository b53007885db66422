"""Bytes that a training step holds whatever its plan: by class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from narrowboat.arena.standin import is_standin
from narrowboat.train.state import state_bytes


@dataclass(frozen=True, slots=True)
class StaticBytes:
    """Bytes by class.

    Attributes:
        weights: parameters.
        buffers: buffers of the model.
        gradients: of the parameters that are trained.
        optimizer: its state after the first step.
        batch: the batch that the caller holds.
        largest_gradient: the largest gradient of one parameter; under accumulation it is there twice for a moment.
        temporaries: what the optimizer's step takes, when the activations are gone.
    """

    weights: int
    buffers: int
    gradients: int
    optimizer: int
    batch: int
    largest_gradient: int
    temporaries: int = 0

    @property
    def total(self) -> int:
        """All classes together."""
        return self.weights + self.buffers + self.gradients + self.optimizer + self.batch

    @property
    def still(self) -> int:
        """Those that neither come nor go in a step."""
        return self.total - self.gradients

    def as_dict(self) -> dict[str, int]:
        """For reports."""
        return {key: value for key, value in asdict(self).items() if key not in ("largest_gradient", "temporaries")}


def static_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None, inputs: Any, targets: Any) -> StaticBytes:
    """Count them; tied weights and shared storages once."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    largest = max((p.numel() * p.element_size() for p in trained), default=0)
    return StaticBytes(
        weights=_distinct(model.parameters()),
        buffers=_distinct(model.buffers()),
        gradients=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        optimizer=state_bytes(optimizer) if optimizer is not None else 0,
        batch=batch_bytes(inputs, targets),
        largest_gradient=largest,
        temporaries=_temporaries(optimizer, largest) if optimizer is not None else 0,
    )


def _temporaries(optimizer: torch.optim.Optimizer, largest: int) -> int:
    """Up to two tensors of a parameter's size at a time; of all of them under ``foreach``; none where fused."""
    most = 0
    for group in optimizer.param_groups:
        if group.get("fused"):
            continue
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        sizes = [p.numel() * p.element_size() for p in trained]
        together = group.get("foreach")
        if together is None:  # torch's own choice on a GPU (``_default_to_fused_or_foreach``)
            together = "foreach" in group and all(p.is_cuda for p in trained)
        most = max(most, sum(sizes) if together else min(max(sizes, default=0), largest))
    return 2 * most


def _distinct(tensors: Iterable[torch.Tensor], kind: str | None = None) -> int:
    storages: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type == "meta" or is_standin(tensor):
            continue  # no bytes in memory
        if kind is not None and tensor.device.type != kind:
            continue
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def batch_bytes(inputs: Any, targets: Any, kind: str | None = None) -> int:
    """Bytes of a batch's tensors; with ``kind``, of those on such devices ("cpu", "cuda")."""
    return _distinct((leaf for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, torch.Tensor)), kind)


def model_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, kind: str = "cpu") -> int:
    """Bytes that the model and the optimizer hold now on devices of a kind; stand-ins hold none."""
    return _distinct([*model.parameters(), *model.buffers(), *_state(optimizer)], kind)


def state_there(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state that are in memory now; before the first step there is none."""
    return _distinct(_state(optimizer))


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, torch.Tensor)]
