"""What is known of a model before anything is traced: its signature, and which module owns which weights."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from narrowboat.errors import ModelError
from narrowboat.profile.use_trace import ENTER, UseTrace


def refuse_foreign_arguments(module: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    try:
        inspect.signature(module.forward).bind(*example[0], **example[1])
    except TypeError as error:
        raise ModelError(f"the example inputs do not fit {type(module).__name__}.forward: {error}") from error
    except ValueError:
        return  # a forward without a signature


def weights_owned(module: nn.Module, numbers: dict[int, int]) -> dict[int, list[int]]:
    owned: dict[int, list[int]] = {}
    for number, (_, child) in enumerate(module.named_modules()):
        # These hand the weights of the modules inside them to one operator.
        fused = isinstance(child, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        inside = child.modules() if fused else (child,)
        tensors = [t for m in inside for t in (*m._parameters.values(), *m._buffers.values())]
        found = [numbers[id(t)] for t in tensors if t is not None and id(t) in numbers]
        if found:
            owned[number] = found
    return owned


def module_by_module(owned: dict[int, list[int]]) -> UseTrace:
    """What is assumed before anything is known: modules run in order of registration, each using what it owns."""
    trace = UseTrace()
    for number, weights in owned.items():
        trace.open_step((number, ENTER))
        for weight in weights:
            trace.use(weight)
    return trace
