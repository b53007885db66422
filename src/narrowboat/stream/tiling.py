"""Whether a budget asks for tiles, and for which: the untiled model wherever it fits, else the best of a few sizes.

Everything here is arithmetic on the trace: no weight is read and the module is not touched.
"""

from __future__ import annotations

from dataclasses import replace

from narrowboat.errors import BudgetError
from narrowboat.plan.model import Machine
from narrowboat.profile.measure import estimate_steps
from narrowboat.profile.rows import gather_bytes
from narrowboat.profile.skeleton import Matched
from narrowboat.profile.tiled_trace import expand
from narrowboat.profile.tiles import SMALLEST, plan_tiles, tileable
from narrowboat.stream.prepare import Prepared

_ANY = 1 << 62  # a budget that holds anything
_PAGE = 4096
_PER_TILE = 6 << 10  # bytes of the module, its dictionaries and its wrapper, on top of what every weight takes
_TRIED = 3  # sizes that are compared by predicted latency
_BANDWIDTH = 1e9  # bytes per second, to compare sizes by; the storage has not been measured yet


def fit(prepared: Prepared, budget: int) -> Prepared:
    """What to stream within ``budget`` bytes: ``prepared`` itself if it fits, else the same model tiled.

    ``least`` is set on what is returned: the smallest budget that any tiling can do with.

    Raises:
        BudgetError: no tiling fits; carries that minimum.
    """
    tilings = _tilings(prepared)
    floors = [tiled.check(_ANY) for tiled in tilings]
    whole = prepared.check(_ANY)
    least = min([whole, *floors], key=lambda floor: floor[0])
    for candidate in (prepared, *tilings):
        candidate.least = least
    if budget >= whole[0]:
        return prepared
    if budget < least[0]:
        min((prepared, *tilings), key=lambda p: p.check(_ANY)[0]).check(budget)  # raises
    fitting = [tiled for tiled, floor in zip(tilings, floors, strict=True) if floor[0] <= budget]
    # Room for two tiles: one is read while the other computes.
    overlapping = [t for t in fitting if t.check(_ANY)[0] + (t.tiling.largest if t.tiling else 0) <= budget]
    return _quickest((overlapping or fitting)[:_TRIED], budget)


def _quickest(candidates: list[Prepared], budget: int) -> Prepared:
    best: tuple[float, Prepared] | None = None
    for tiled in candidates:
        try:
            seconds = tiled.choose(Machine(bandwidth=_BANDWIDTH), budget)[0].predicted_latency
        except BudgetError:  # a scheme other than the best may need more
            continue
        if best is None or seconds < best[0] * 0.99:
            best = seconds, tiled
    return best[1] if best is not None else candidates[0]


def _tilings(prepared: Prepared) -> list[Prepared]:
    """The model tiled to each size worth trying, the largest first."""
    candidates = tileable(prepared.module, prepared.matched, prepared.trace)
    largest = max((prepared.weights[w].entry.nbytes for w in candidates), default=0)
    tilings = []
    limit = SMALLEST
    while limit < largest:
        tiling = plan_tiles(prepared.module, prepared.matched, candidates, limit)
        limit *= 2
        if tiling is None:
            continue
        trace = expand(prepared.trace, tiling) if prepared.trace is not None else None
        parts = dict(prepared.fixed_parts)
        tiles = [tiling.weights[t].entry for layer in tiling.layers for t in layer.tiles]
        parts["bookkeeping"] += len(tiles) * _PER_TILE + (len(tiling.weights) - len(prepared.weights)) * _PER_TILE
        if trace is None:  # else what lookups take is in the peak of the pass
            tables = [layer.kind for layer in tiling.layers if not layer.tiles]
            parts["lookups"] = gather_bytes(tables[0], 0, 0) if tables else 0
        if any(tile.offset % _PAGE for tile in tiles):
            parts["staging"] = prepared.storage.staging_bytes
        tilings.append(
            replace(
                prepared,
                matched=Matched(list(tiling.weights), dict(prepared.matched.numbers)),
                trace=trace,
                fixed_parts=parts,
                owned=tiling.owned(prepared.owned),
                step_seconds=estimate_steps(trace) if trace is not None else (),
                tiling=tiling,
                corrections=dict(prepared.corrections),
                _groups=None,
            )
        )
    return tilings[::-1]
