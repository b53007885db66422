"""The order in which a model uses its tensors, for ``pack``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from narrowboat.checkpoint import WeightsIndex
from narrowboat.errors import ModelError, UsageError
from narrowboat.profile.skeleton import build_skeleton, match_weights
from narrowboat.profile.use_trace import TraceError, trace_uses


def split_example(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` of an example given as a tuple of positional or a dict of keyword arguments.

    Raises:
        UsageError: it is neither.
    """
    if isinstance(example, dict) or hasattr(example, "keys"):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    raise UsageError(
        "example must be a tuple of positional arguments or a dict of keyword arguments, "
        f"not {type(example).__name__}; "
        "for one tensor write example=(x,)"
    )


def execution_order(
    factory: Callable[[], nn.Module] | nn.Module, index: WeightsIndex, example: Any = None
) -> list[str]:
    """Names of the stored tensors in the order in which one pass first uses them.

    Args:
        factory: module or factory; ``factory.example_inputs()`` is used if ``example`` is None.
        index: the weights file the names belong to.
        example: inputs of one pass.

    Raises:
        ModelError: the model cannot be run on fake tensors.
        WeightsMismatchError: the file is not this model's.
    """
    if example is None:
        maker = getattr(factory, "example_inputs", None)
        if maker is None:
            raise UsageError(
                "the execution order needs example inputs: pass example=, or give the factory .example_inputs()"
            )
        example = maker()
    args, kwargs = split_example(example)
    module = build_skeleton(factory)
    matched = match_weights(module, index)
    try:
        trace = trace_uses(module, matched.numbers, args, kwargs)
    except TraceError as error:
        raise ModelError(f"the model cannot be traced without running it: {error}") from error
    return [matched.weights[w].entry.name for w in trace.execution_order()]
