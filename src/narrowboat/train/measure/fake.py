"""A training pass on fake tensors: nothing is computed and nothing allocated, but every storage is seen.

``FakeTensorMode`` is torch's own stand-in execution (``torch._subclasses``; MemTracker is built on it), and
``_reparametrize_module`` what ``torch.func.functional_call`` is made of. This file is the only one that knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module

from narrowboat.arena.standin import is_standin
from narrowboat.train.measure.meter import walk
from narrowboat.train.micro_batch import batch_size, mapped
from narrowboat.train.random_state import RandomState
from narrowboat.train.tape.structure import Tape
from narrowboat.train.undisturbed import Attributes, attributes_kept

Forward = Callable[[Any, Any], torch.Tensor]


class _Whole(nn.Module):
    """Model and loss as one module, so that ``functional_call`` reaches every parameter."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._call = forward

    def forward(self, inputs: Any, targets: Any) -> torch.Tensor:
        return self._call(inputs, targets)


def fake_walk(
    model: nn.Module, forward: Forward, inputs: Any, targets: Any, batch: int, *, backward: bool = True
) -> Tape:
    """Write down a training pass without computing it.

    Args:
        model: stays as it is; its parameters and buffers are replaced by fake ones for the pass.
        forward: gives the loss of inputs and targets.
        inputs, targets: real or meta; ``batch`` samples are made of them by repeating or cutting along dimension 0
            where a leaf has the inputs' batch size there.
        batch: samples in the pass.

    Raises:
        Exception: whatever fake execution cannot do (data-dependent shapes, operators without a fake kernel).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    whole = _Whole(model, forward)
    tensors: dict[str, torch.Tensor] = {}
    known: dict[int, torch.Tensor] = {}
    for name, tensor in [
        *whole.named_parameters(remove_duplicate=False),
        *whole.named_buffers(remove_duplicate=False),
    ]:
        if id(tensor) not in known:
            fake = _fake_of(mode, tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if is_parameter else fake
        tensors[name] = known[id(tensor)]
    parameters = [tensor for tensor in known.values() if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
    size = batch_size(inputs, targets)

    def sized(value: torch.Tensor) -> torch.Tensor:
        shape = list(value.shape)
        if shape and shape[0] == size:
            shape[0] = batch
        made = torch.empty_strided(shape, _strides(value, shape), dtype=value.dtype, device=value.device)
        return made.requires_grad_(value.requires_grad)

    random = RandomState()

    def loss() -> torch.Tensor:
        # Both passes of the walk take the same turns.
        attributes.restore()
        random.restore_python()
        return whole(fake_inputs, fake_targets)

    try:
        # In the backward pass too, where a model that recomputes by itself runs once more.
        with attributes_kept(*model.modules()), _reparametrize_module(whole, tensors, tie_weights=True), mode:
            attributes = Attributes(model.modules())
            fake_inputs, fake_targets = mapped(sized, inputs), mapped(sized, targets)
            return walk(whole.model, loss, parameters, batch, backward=backward)
    finally:
        random.restore()


def _strides(value: torch.Tensor, shape: list[int]) -> list[int]:
    """Strides for ``shape`` with the dimensions in the order of memory that ``value`` has (channels last, say)."""
    strides, step = [0] * len(shape), 1
    for dimension in sorted(range(len(shape)), key=lambda d: (value.stride(d), -d)):
        strides[dimension], step = step, step * max(shape[dimension], 1)
    return strides


def _fake_of(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    if is_standin(tensor):  # on storage: its bytes are not wanted
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return mode.from_tensor(tensor.detach())
