"""How many bytes an optimizer's state and the gradients will take, before there are any.

The optimizer is asked, not its name: a copy of it makes one step over stand-ins on the meta device, or, where its step
needs numbers, over small parameters whose sizes tell by what each dimension of a state tensor grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from narrowboat.errors import TrainingError
from narrowboat.train.state.stepping import PRIMES, small_copy, small_parameter, step_some

# Settings that pick a kernel for real devices; without them the same state is made.
_KERNELS = ("foreach", "fused", "capturable")


def nbytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradient_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the gradients of all parameters that require one."""
    return nbytes_of(parameter for parameter in parameters if parameter.requires_grad)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the tensors of the optimizer's state take, after its first step if it has not made one.

    Parameters that do not require a gradient have no state unless they have it already.

    Raises:
        TrainingError: the optimizer cannot make a step on a small copy of its parameters.
    """
    return sum(nbytes_of(tensors) for tensors in state_tensors(optimizer).values())


def state_tensors(optimizer: Optimizer) -> dict[torch.Tensor, list[torch.Tensor]]:
    """For every parameter, the tensors its state consists of, or stand-ins on the meta device for those to come.

    Raises:
        TrainingError: as :func:`state_bytes`.
    """
    found: dict[torch.Tensor, list[torch.Tensor]] = {}
    learned: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            there = optimizer.state.get(parameter)
            if there:
                found[parameter] = [value for value in there.values() if isinstance(value, torch.Tensor)]
            elif parameter.requires_grad:
                key = number, tuple(parameter.shape), parameter.stride(), parameter.dtype, parameter.device
                if key not in learned:
                    learned[key] = _learn(optimizer, group, parameter)
                found[parameter] = learned[key]
            else:
                found[parameter] = []
    return found


def _learn(optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor) -> list[torch.Tensor]:
    try:
        standin = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
        made = _first_state(optimizer, group, standin, {key: False for key in _KERNELS if key in group})
    except Exception:
        # Any error: a step may ask for a number in many ways. The small copy has numbers to give.
        with torch.random.fork_rng([parameter.device] if parameter.device.type == "cuda" else []):
            small = small_parameter(parameter)
            try:
                made = _first_state(optimizer, group, small, {})
            except Exception as error:
                raise TrainingError(
                    f"cannot tell how much state {type(optimizer).__name__} keeps: its step fails on a small "
                    f"parameter ({type(error).__name__}: {error})"
                ) from error
        made = [_grown(tensor, tuple(small.shape), tuple(parameter.shape)) for tensor in made]
    return [torch.empty_like(tensor, device="meta") for tensor in made]


def _first_state(
    optimizer: Optimizer, group: dict[str, Any], parameter: torch.Tensor, settings: dict[str, Any]
) -> list[torch.Tensor]:
    twin = small_copy(optimizer, [{**group, **settings, "params": [parameter]}])
    parameter.grad = torch.zeros_like(parameter)
    step_some(twin, [parameter])
    return [value for value in twin.state[parameter].values() if isinstance(value, torch.Tensor)]


def _grown(tensor: torch.Tensor, small: tuple[int, ...], real: tuple[int, ...]) -> torch.Tensor:
    """The small state tensor at the real parameter's size; dimensions of its own stay as they are."""
    shape = tuple(real[small.index(size)] if size in small else size for size in tensor.shape)
    if len(small) <= len(PRIMES) and tensor.dim() == 1 and tensor.numel() == math.prod(small) and len(small) != 1:
        shape = (math.prod(real),)  # kept flat
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
