"""What a step can change before its optimizer runs, so that a step that fails leaves everything as it was."""

from __future__ import annotations

import torch
from torch import nn

from narrowboat.train.random_state import RandomState

_PLAIN = (int, float, str, bool, bytes, type(None))


class Snapshot:
    """Buffers, plain attributes of modules, gradients and random generators at the beginning of a step.

    Gradients are remembered by reference: a step begins with none, so nothing is added to those that were there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (buffer, buffer.detach().clone(), buffer._version)
            for buffer in model.buffers()
            if type(buffer) is torch.Tensor and buffer.device.type != "meta"
        ]
        self._tables = [(module, dict(module._buffers)) for module in model.modules() if module._buffers]
        # Counters and flags; a tensor among the attributes must not live longer for being noted here.
        self._attributes = [
            (module, set(module.__dict__), {k: v for k, v in module.__dict__.items() if isinstance(v, _PLAIN)})
            for module in model.modules()
        ]
        self._random = RandomState()
        self._parameters = list(model.parameters())

    def restore(self) -> None:
        """Put everything back; gradients of the step are dropped."""
        for module, table in self._tables:
            module._buffers.clear()
            module._buffers.update(table)
        for module, names, values in self._attributes:
            for name in set(module.__dict__) - names:
                del module.__dict__[name]
            module.__dict__.update(values)
        with torch.no_grad():
            for buffer, value, _ in self._buffers:
                buffer.copy_(value)
        self._random.restore()
        for parameter in self._parameters:
            parameter.grad = None
