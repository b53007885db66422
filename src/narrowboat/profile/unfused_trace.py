"""The trace of a model some of whose attention layers go step by step, from two: with all fused, and with none."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from narrowboat.profile.attention import can_unfuse
from narrowboat.profile.tiles import SMALLEST
from narrowboat.profile.trace_cache import load_trace, save_trace
from narrowboat.profile.use_trace import ENTER, EXIT, TraceError, UseTrace, trace_uses


def trace_unfused(
    module: nn.Module,
    numbers_of: dict[int, int],
    example: tuple[tuple[Any, ...], dict[str, Any]],
    fused: UseTrace,
    key: str,
) -> UseTrace | None:
    """A pass without fused attention; None if no weight of such layers is worth a tile, or it cannot be traced.

    Args:
        module: the skeleton.
        numbers_of: ``id(tensor) -> weight number``.
        example: ``(args, kwargs)``.
        fused: the trace of the model as it is.
        key: of that trace in the cache.
    """
    layers = _fusing(module)
    if not any(p.nbytes > SMALLEST for child in module.modules() if can_unfuse(child) for p in child.parameters()):
        return None
    kept = f"{key}-unfused"
    trace = load_trace(kept)
    if trace is None:
        try:
            trace = trace_uses(module, numbers_of, *example, unfused=True)
        except TraceError:
            return None
        save_trace(kept, trace)
    return trace if _pieces(fused, trace, layers) is not None else None


def unfuse_trace(fused: UseTrace, unfused: UseTrace | None, module: nn.Module, numbers: Collection[int]) -> UseTrace:
    """The trace in which the layers of these module numbers go step by step, and the others stay fused.

    Args:
        fused: a pass of the model as it is.
        unfused: one without fused attention.
        module: the skeleton.
        numbers: attention and encoder layers.
    """
    pieces = _pieces(fused, unfused, _fusing(module)) if numbers and unfused is not None else None
    if pieces is None or unfused is None:
        return fused
    out = UseTrace(
        written=fused.written | unfused.written,
        output_bytes=fused.output_bytes,
        cache_bytes=fused.cache_bytes,
        whole=fused.whole | unfused.whole,
        taken=tuple(max(pair) for pair in zip(fused.taken, unfused.taken, strict=True)),
    )
    places: tuple[dict[int, int], dict[int, int]] = {}, {}
    for layer, steps, others in pieces:
        chosen, which = (unfused, 1) if layer in numbers else (fused, 0)
        if layer is None:  # a step outside of them, at its place in both
            places[1][others.start] = len(out.events)
        for step in others if which else steps:
            places[which][step] = len(out.events)
            out.repeat(chosen, step)
            out.alive += chosen.alive[step : step + 1]
    holds = {
        (w, at[first], at[last])
        for trace, at in zip((fused, unfused), places, strict=True)
        for w, first, last in trace.holds
        if first in at and last in at
    }
    out.holds = sorted(holds)
    inputs = fused.activation_bytes if fused.activation_bytes > max(fused.peaks, default=0) else 0
    out.activation_bytes = max([inputs, *out.peaks])
    return out


def _fusing(module: nn.Module) -> set[int]:
    return {number for number, (_, child) in enumerate(module.named_modules()) if can_unfuse(child)}


_Piece = tuple[int | None, range, range]  # the layer, its steps in the one trace and in the other


def _pieces(fused: UseTrace, unfused: UseTrace, layers: Collection[int]) -> list[_Piece] | None:
    """Both traces cut where such a layer is entered and left; None if they do not go the same way outside."""
    pieces: list[_Piece] = []
    i = j = 0
    while i < len(fused.events) and j < len(unfused.events):
        event = fused.events[i]
        if unfused.events[j] != event:
            return None
        if event[1] == ENTER and event[0] in layers:
            one, other = _end(fused, i), _end(unfused, j)
            pieces.append((event[0], range(i, one), range(j, other)))
            i, j = one, other
        else:
            pieces.append((None, range(i, i + 1), range(j, j + 1)))
            i, j = i + 1, j + 1
    return pieces if i == len(fused.events) and j == len(unfused.events) else None


def _end(trace: UseTrace, step: int) -> int:
    """The step that opens as the layer entered at ``step`` is left."""
    leaving = (trace.events[step][0], EXIT)
    return trace.events.index(leaving, step)
