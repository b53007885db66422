"""Trying a model out without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from narrowboat.train.containers import Containers

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Buffers, modes, attributes of modules and random streams (torch, numpy, Python) are afterwards as before.

    Parameters and their ``.grad`` are not looked after: take gradients with ``torch.autograd.grad``.
    """
    every = [module for root in modules for module in root.modules()]
    modes = [(module, module.training) for module in every]
    buffers = [(module, name, buffer, _kept(buffer)) for module in every for name, buffer in module._buffers.items()]
    devices = {buffer.device for root in modules for buffer in (*root.parameters(), *root.buffers())}
    accelerators = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(accelerators), attributes_kept(*every):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


class Attributes:
    """What the attributes of modules refer to now, tables of parameters, buffers and submodules included.

    Lists, dicts and plain objects that are reached from them hold afterwards what they held (``containers``).
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._saved = [dict(module.__dict__) for module in self._modules]
        self._tables = [{name: dict(module.__dict__[name]) for name in _TABLES} for module in self._modules]
        self._containers = Containers(self._modules)

    def restore(self) -> None:
        """Let them refer to the same again."""
        for module, attributes, table in zip(self._modules, self._saved, self._tables, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in table.items():
                module.__dict__[name].clear()
                module.__dict__[name].update(content)
        self._containers.restore()


@contextmanager
def attributes_kept(*modules: nn.Module) -> Iterator[None]:
    """Whatever is assigned to attributes of these modules inside (counters, fake tensors) is undone at the end."""
    attributes = Attributes(modules)
    try:
        yield
    finally:
        attributes.restore()


def _kept(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()
