"""The trace of a tiled model, from that of the same model in one piece: what changes is known, so nothing is run."""

from __future__ import annotations

from dataclasses import dataclass, field

from narrowboat.profile.rows import gather_bytes
from narrowboat.profile.tiles import TiledLayer, Tiling, is_convolution
from narrowboat.profile.use_trace import ENTER, EXIT, Event, UseTrace

_KEPT = 64 << 10  # pieces from here on are given back to the system by the strict allocator policy
_LARGE = 1 << 20  # and these by the balanced one


@dataclass
class _Step:
    event: Event
    uses: list[int] = field(default_factory=list)
    flops: float = 0.0
    traffic: float = 0.0
    peak: int = 0
    largest: int = 0
    looked_up: int = 0


def expand(trace: UseTrace, tiling: Tiling) -> UseTrace:
    """The steps of one pass with a step of its own for each tile.

    Peaks of activations are upper bounds: a tile's result lies beside the layer's output, and the workspace of a
    convolution holds one tile of its weight instead of the whole.

    Args:
        trace: one pass of the model in one piece, taken on fake tensors.
        tiling: what is cut.
    """
    layers = {layer.number: layer for layer in tiling.layers}
    out = UseTrace(written=set(trace.written), output_bytes=trace.output_bytes)
    taken = list(trace.taken)
    starts, ends = [], []
    for i, event in enumerate(trace.events):
        step = _Step(event, trace.uses[i], trace.flops[i], trace.traffic[i], trace.peaks[i], trace.largest[i])
        step.looked_up = trace.looked_up[i]
        layer = layers.get(event[0]) if event[1] == ENTER else None
        starts.append(len(out.events))
        if layer is None or layer.whole not in step.uses:
            _append(out, step)
        elif layer.tiles:
            for inner in _tiled(step, layer, tiling):
                _append(out, inner)
                for at, least in enumerate((_KEPT, _LARGE)):
                    taken[at] += inner.largest if inner.event[0] != layer.number and inner.largest >= least else 0
        else:
            _append(out, _looked_up(step, layer, tiling))
        ends.append(len(out.events) - 1)
    out.holds = [(w, starts[first], ends[last]) for w, first, last in trace.holds]
    before = trace.activation_bytes if trace.activation_bytes > max(trace.peaks, default=0) else 0
    out.activation_bytes = max([before, *out.peaks])
    out.taken = (taken[0], taken[1])
    return out


def _append(trace: UseTrace, step: _Step) -> None:
    trace.open_step(step.event)
    trace.uses[-1] = list(step.uses)
    trace.flops[-1], trace.traffic[-1] = step.flops, step.traffic
    trace.peaks[-1], trace.largest[-1], trace.looked_up[-1] = step.peak, step.largest, step.looked_up


def _tiled(step: _Step, layer: TiledLayer, tiling: Tiling) -> list[_Step]:
    whole = tiling.weights[layer.whole].entry
    rows = whole.shape[0]
    output = step.largest
    widest = max(tiling.weights[t].entry.nbytes for t in layer.tiles)
    most = max(stop - start for start, stop in layer.slices)
    part = -(-output * most // rows)  # bytes of a tile's result
    peak = step.peak + part
    if is_convolution(layer.kind):
        peak = max(peak - whole.nbytes + widest, part)  # counted as workspace beside the tensors
    shared = max(step.traffic - whole.nbytes - output, 0.0)  # the input, which every tile reads
    steps = [_Step(step.event, [w for w in step.uses if w != layer.whole], peak=peak, largest=output)]
    for i, (tile, (start, stop)) in enumerate(zip(layer.tiles, layer.slices, strict=True)):
        share = (stop - start) / rows
        result = -(-output * (stop - start) // rows)
        moved = shared + tiling.weights[tile].entry.nbytes + 2 * result
        number = layer.first + i
        steps.append(_Step((number, ENTER), [tile], step.flops * share, moved, peak, result))
        steps.append(_Step((number, EXIT)))
    return steps


def _looked_up(step: _Step, layer: TiledLayer, tiling: Tiling) -> _Step:
    whole = tiling.weights[layer.whole].entry
    row = whole.nbytes // whole.shape[0]
    read = step.looked_up * row
    return _Step(
        step.event,
        [w for w in step.uses if w != layer.whole],
        step.flops,
        max(step.traffic - whole.nbytes, 0.0) + read,
        step.peak + gather_bytes(layer.kind, step.looked_up, row),
        step.largest,
        step.looked_up,
    )
