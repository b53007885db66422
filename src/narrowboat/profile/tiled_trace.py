"""The trace of a tiled model, from that of the same model in one piece: what changes is known, so nothing is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from narrowboat.profile.attention_trace import project
from narrowboat.profile.convolution import blocked
from narrowboat.profile.rows import gather_bytes
from narrowboat.profile.tiled_forward import CONVOLUTIONS
from narrowboat.profile.tiles import TiledLayer, Tiling
from narrowboat.profile.use_trace import ENTER, EXIT, PIECES, UseTrace

_STRIPS = (2, 4, 8, 16, 32)
_THIN = 256 << 10  # bytes of input that a strip should have: kernels choose their path by size


@dataclass
class _Convolution:
    """Bytes of one convolution's step: what is alive around it, its input, weight and output, its unfolded input."""

    around: int
    input: int
    weight: int
    output: int
    columns: int
    rows: int

    def peak(self, weight: int, part: float, strips: int, layer: Any) -> tuple[int, int]:
        """The most bytes alive if it is made of tiles of ``weight`` bytes, ``part`` of the output each, in strips.

        Returns:
            Those bytes, and how many of them are new (``UseTrace.fresh``), the output left out.
        """
        source, columns, strip = self.input, self.columns, 0
        result = int(self.output * part) + 1
        if strips > 1:
            result = int(self.output * part / strips * 1.1)
            made = -(-self.rows // strips)
            reach = layer.dilation[0] * (layer.kernel_size[0] - 1) + 1
            source = min(source, source * ((made - 1) * layer.stride[0] + reach) // (self.rows * layer.stride[0]))
            columns = int(columns / strips * 1.1)
            strip = source  # its rows lie apart, and are copied
        new = strip + result + (columns or blocked(source, weight, result))
        return self.around + new, new + (0 if columns else min(source, result))


def _convolution(trace: UseTrace, step: int, weight: int) -> _Convolution:
    output = trace.largest[step]
    source = max(int(trace.traffic[step]) - weight - output, 0)
    around = max(trace.peaks[step] - trace.workspaces[step], 0)
    return _Convolution(around, source, weight, output, trace.columns[step], max(trace.rows[step], 1))


def plan_strips(module: nn.Module, trace: UseTrace, target: int) -> dict[int, int]:
    """Into how many strips to cut the convolutions whose step holds more than ``target`` bytes, by module number.

    Only where it brings the step down; the smallest number that reaches the target, or the largest worth having.
    """
    modules: list[Any] = [child for _, child in module.named_modules()]
    found: dict[int, int] = {}
    for step, (number, kind) in enumerate(trace.events):
        layer = modules[number]
        if kind != ENTER or trace.peaks[step] <= target or not _can_strip(layer):
            continue
        sizes = _convolution(trace, step, layer.weight.nbytes)
        worth = [n for n in _STRIPS if n * 2 <= sizes.rows and sizes.input // n >= _THIN]
        best = 1
        for n in worth:
            peak, _ = sizes.peak(sizes.weight, 1.0, n, layer)
            if peak < trace.peaks[step]:
                best = n
                if peak <= target:
                    break
        if best > 1:
            found[number] = max(best, found.get(number, 1))
    return found


def _can_strip(layer: Any) -> bool:
    return (
        type(layer) in CONVOLUTIONS
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and "forward" not in layer.__dict__
        and "weight" in layer._parameters
    )


def expand(trace: UseTrace, tiling: Tiling, module: nn.Module) -> UseTrace:
    """The steps of one pass with a step of its own for each tile.

    Peaks of activations are upper bounds: a tile's result lies beside the layer's output, and the workspace of a
    convolution holds one tile of its weight instead of the whole, and one strip instead of the whole image.

    Args:
        trace: one pass of the model in one piece, taken on fake tensors.
        tiling: what is cut.
        module: the skeleton.
    """
    modules: list[Any] = [child for _, child in module.named_modules()]
    layers: dict[int, list[TiledLayer]] = {}
    for layer in tiling.layers:
        layers.setdefault(layer.user, []).append(layer)
    out = UseTrace(written=set(trace.written), output_bytes=trace.output_bytes, whole=set(trace.whole))
    taken = list(trace.taken)
    starts, ends, made = [], [], []
    for step, event in enumerate(trace.events):
        starts.append(len(out.events))
        out.repeat(trace, step)
        found = layers.get(event[0], ()) if event[1] == ENTER else ()
        used = [layer for layer in found if layer.whole in trace.uses[step]]
        made.append(trace.largest[step])
        if used and used[0].table:
            _look_up(out, trace, step, used[0], tiling)
        elif used:
            if type(modules[event[0]]) is nn.MultiheadAttention:
                piece = project(out, trace, step, used, tiling)
                # Query, key and value, or before and after the output projection.
                beside = trace.peaks[step] + piece - (trace.alive[step] if trace.alive else 0)
                made[-1] = min(3 * made[-1], max(beside, 0))
            else:
                piece = _tile(out, trace, step, used[0], tiling, modules[event[0]])
            for at, least in enumerate(PIECES):
                taken[at] += int(trace.traffic[step]) if piece >= least else 0
        ends.append(len(out.events) - 1)
    out.cache_bytes = trace.cache_bytes
    if trace.alive:  # between two tiles there is the output as well
        bounds = zip(starts, ends, trace.alive, made, strict=False)
        out.alive = [
            nbytes + (more if last > first else 0)
            for first, last, nbytes, more in bounds
            for _ in range(first, last + 1)
        ]
        out.alive += trace.alive[len(trace.events) :]
    out.holds += [(w, starts[first], ends[last]) for w, first, last in trace.holds]
    before = trace.activation_bytes if trace.activation_bytes > max(trace.peaks, default=0) else 0
    out.activation_bytes = max([before, *out.peaks])
    out.taken = tuple(taken)
    return out


def _tile(out: UseTrace, trace: UseTrace, step: int, layer: TiledLayer, tiling: Tiling, module: Any) -> int:
    """Spread the step over the layer's tiles; returns the bytes of the pieces that are made one after the other."""
    whole = tiling.weights[layer.whole].entry
    rows, output = whole.shape[0], trace.largest[step]
    widest = max((tiling.weights[t].entry.nbytes for t in layer.tiles), default=whole.nbytes)
    most = max((stop - start for start, stop in layer.slices), default=rows) / rows
    if layer.kind in CONVOLUTIONS and module.padding_mode == "zeros":
        peak, fresh = _convolution(trace, step, whole.nbytes).peak(widest, most, layer.strips, module)
    else:
        peak, fresh = trace.peaks[step] + int(output * most) + 1, int(output * most) + 1
    out.peaks[-1], out.fresh[-1] = peak, fresh + output
    piece = int(output * most / layer.strips)
    if not layer.tiles:
        return piece
    flops, shared = trace.flops[step], max(trace.traffic[step] - whole.nbytes - output, 0.0)
    out.uses[-1] = [w for w in trace.uses[step] if w != layer.whole]
    out.flops[-1] = out.traffic[-1] = 0.0
    for i, (tile, (start, stop)) in enumerate(zip(layer.tiles, layer.slices, strict=True)):
        share = (stop - start) / rows
        out.open_step((layer.first + i, ENTER))
        out.use(tile)
        # Every tile reads the input; its result is written, and copied to its place.
        out.traffic[-1] = shared + tiling.weights[tile].entry.nbytes + 3 * output * share
        out.flops[-1], out.peaks[-1], out.largest[-1] = flops * share, peak, int(output * share)
        out.fresh[-1] = fresh + (0 if i else output)
        out.open_step((layer.first + i, EXIT))
    return piece


def _look_up(out: UseTrace, trace: UseTrace, step: int, layer: TiledLayer, tiling: Tiling) -> None:
    whole = tiling.weights[layer.whole].entry
    row = whole.nbytes // whole.shape[0]
    indices = trace.looked_up[step]
    out.uses[-1] = [w for w in trace.uses[step] if w != layer.whole]
    out.traffic[-1] = max(trace.traffic[step] - whole.nbytes, 0.0) + indices * row
    out.peaks[-1] = trace.peaks[step] + gather_bytes(layer.kind, indices, row)
