"""The steps of an attention whose projections are in tiles, from the one step it is with its weights in whole."""

from __future__ import annotations

from narrowboat.profile.tiles import TiledLayer, Tiling
from narrowboat.profile.use_trace import ENTER, EXIT, UseTrace


def project(out: UseTrace, trace: UseTrace, step: int, layers: list[TiledLayer], tiling: Tiling) -> int:
    """Spread the step, the last of ``out``, over the tiles: in-projection, attention, output projection.

    Operations are shared out by the bytes of the weights they are done with. Peaks are upper bounds: what the step
    holds with its weights in whole, unfused, and the result of one tile beside it.

    Returns:
        Bytes of the largest piece that is made apart.
    """
    used, cut = trace.uses[step], {layer.whole for layer in layers}
    rows = {layer.whole: tiling.weights[layer.whole].entry.shape[0] for layer in layers}
    most = max((stop - start) / rows[layer.whole] for layer in layers for start, stop in layer.slices)
    piece = int(trace.largest[step] * most)
    peak = trace.peaks[step] + piece + 1
    flops, traffic = trace.flops[step], trace.traffic[step]
    total = sum(tiling.weights[w].entry.nbytes for w in used) or 1

    def share(weight: int) -> float:
        return tiling.weights[weight].entry.nbytes / total

    def note(part: float) -> None:
        out.flops[-1], out.traffic[-1] = flops * part, traffic * part
        out.peaks[-1], out.largest[-1], out.fresh[-1] = peak, trace.largest[step], trace.fresh[step] + piece

    def go_over(layer: TiledLayer) -> None:
        for i, tile in enumerate(layer.tiles):
            out.open_step((layer.first + i, ENTER))
            out.use(tile)
            note(share(tile))
            out.open_step((layer.first + i, EXIT))

    begin = len(out.events) - 1
    early = [w for w in used if w in tiling.projecting and w not in cut]
    late = [w for w in used if w not in tiling.projecting and w not in cut]
    projections = [layer for layer in layers if layer.key != "weight"]
    out.uses[-1] = early
    note(sum(map(share, early)))
    for layer in projections:
        go_over(layer)
    if projections:
        note(sum(map(share, late)))
    else:
        note(sum(map(share, (*early, *late))))
    out.uses[-1] += [w for w in late if w not in out.uses[-1]]
    attention = len(out.events) - 1
    for layer in layers:
        if layer.key == "weight":
            out.open_step((layer.number, ENTER))
            out.holds += [(w, attention, len(out.events) - 1) for w in late]
            go_over(layer)
            out.open_step((layer.number, EXIT))
    # Weights that are given to it as data: every tile of the in-projection may read them.
    out.holds += [(w, begin, attention) for w in late if w not in tiling.attending]
    return piece
