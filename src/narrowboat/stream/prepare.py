"""Everything that can be known, and refused, before the model is touched or a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from narrowboat.arena.slot import Weight
from narrowboat.checkpoint import WeightsIndex, open_index
from narrowboat.plan.model import Workload
from narrowboat.profile.measure import estimate_steps
from narrowboat.profile.skeleton import build_skeleton, fixed_buffer_bytes, match_weights
from narrowboat.profile.use_trace import ENTER, TraceFailed, UseTrace, trace_uses, weight_numbers
from narrowboat.profile.workload import Group, form_groups

CHUNK = 2 << 20  # bytes per read call
WORKERS = 2  # reads under way at once
_PAGE = 4096
_PER_WEIGHT = 6 << 10  # bytes of Python and tensor objects per weight: parameter, stand-in, view, entry


@dataclass
class Prepared:
    """A model matched with its weights at rest, and traced.

    Attributes:
        module: the skeleton (or the materialised module as given).
        index: the weights at rest.
        weights: what the two have in common, in the model's order.
        trace: what one pass uses; None if it could not be run on fake tensors or there was no example.
        fixed_parts: bytes the budget pays besides weights, by name.
        owned: for each module number, the weights registered on that module itself.
        step_seconds: computing time by step, estimated at first, measured later.
    """

    module: nn.Module
    index: WeightsIndex
    weights: list[Weight]
    trace: UseTrace | None
    fixed_parts: dict[str, int]
    owned: dict[int, list[int]]
    step_seconds: tuple[float, ...] = ()
    why_untraced: str = ""

    def workload(self) -> tuple[Workload, list[Group]]:
        """What the planner is given, and the weights each of its blocks stands for."""
        trace = self.trace if self.trace is not None else _module_by_module(self.owned)
        groups = form_groups(trace, self.weights, packed=self.index.packed)
        seconds = self.step_seconds or tuple(1e-3 for _ in trace.uses)
        parts = tuple(self.fixed_parts.items())
        return Workload(tuple(g.block for g in groups), seconds, sum(nbytes for _, nbytes in parts), parts), groups


def prepare(
    model: Callable[[], nn.Module] | nn.Module,
    weights: str | Path,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    *,
    strict: bool = True,
) -> Prepared:
    """Build the skeleton, open the weights, match them, and trace one pass on fake tensors.

    Args:
        model: factory or module.
        weights: file or folder.
        example: ``(args, kwargs)`` of one pass, or None.
        strict: refuse tensors in the file that the model does not have.
    """
    module = build_skeleton(model)
    index = open_index(weights)
    index.require_streamable()
    matched = match_weights(module, index, strict=strict)
    numbers = weight_numbers(module, matched, index.resolve)
    trace, why = None, "no example inputs"
    if example is not None:
        try:
            trace = trace_uses(module, numbers, *example)
        except TraceFailed as error:
            why = str(error)
    parts = {"buffers": fixed_buffer_bytes(module)}
    if trace is not None:
        parts["activations"] = trace.activation_bytes
        parts["workspace"] = trace.workspace_bytes
    if not index.packed:
        parts["staging"] = WORKERS * (CHUNK + 2 * _PAGE)
    parts["bookkeeping"] = _PER_WEIGHT * len(matched)
    return Prepared(
        module,
        index,
        matched,
        trace,
        parts,
        _owned(module, numbers),
        estimate_steps(trace) if trace is not None else (),
        "" if trace is not None else why,
    )


def _owned(module: nn.Module, numbers: dict[int, int]) -> dict[int, list[int]]:
    owned: dict[int, list[int]] = {}
    for number, (_, child) in enumerate(module.named_modules()):
        tensors = [*child._parameters.values(), *child._buffers.values()]
        found = [numbers[id(t)] for t in tensors if t is not None and id(t) in numbers]
        if found:
            owned[number] = found
    return owned


def _module_by_module(owned: dict[int, list[int]]) -> UseTrace:
    """What is assumed before anything is known: modules run in order of registration, each using what it owns."""
    trace = UseTrace()
    for number, weights in owned.items():
        trace.open_step((number, ENTER))
        for weight in weights:
            trace.use(weight)
    return trace
