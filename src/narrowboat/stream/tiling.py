"""Whether a budget asks for tiles, and for which: the untiled model wherever it fits, else the best of a few sizes.

Everything here is arithmetic on the trace: no weight is read and the module is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from narrowboat.errors import BudgetError
from narrowboat.plan.model import PAGE, Machine
from narrowboat.profile.experts import by_expert, find_experts, without_experts
from narrowboat.profile.measure import estimate_steps
from narrowboat.profile.rows import gather_bytes
from narrowboat.profile.skeleton import Matched
from narrowboat.profile.tiled_trace import expand, plan_strips
from narrowboat.profile.tiles import SMALLEST, Owner, Tiling, plan_tiles, tileable
from narrowboat.profile.unfused_trace import unfuse_trace
from narrowboat.stream.prepare import Prepared

_ANY = 1 << 62  # a budget that holds anything
_PER_CELL = 2 << 10  # bytes of one expert's place in the cache: objects, views, routing counts
_PER_TILE = 12 << 10  # bytes of a tile's weight (see ``stream.prepare``), its module and its wrapper
_STRIPS = 5 << 19  # bytes that the heap keeps between strips
_TRIED = 3  # sizes that are compared by predicted latency
_WORTH_ROWS = 16 << 20  # bytes of a table from which on it is worth a read per token
_PEAKS = (0.8, 0.65, 0.5)  # shares of the untiled peak of activations that strips are made for
_BANDWIDTH = 1e9  # bytes per second, to compare sizes by; the storage has not been measured yet


@dataclass(frozen=True)
class _Rung:
    """One way to cut the model: sizes only, so that ways not taken leave nothing in memory."""

    limit: int
    strips: dict[int, int]
    floor: tuple[int, str]
    largest: int


def fit(prepared: Prepared, budget: int, *, whole_stacks: bool = False) -> Prepared:
    """What to stream within ``budget`` bytes: ``prepared`` itself if it fits, else the same model tiled.

    Where not everything can stay, experts are read on demand. ``least`` is set on what is returned: the smallest
    budget that any tiling can do with.

    Args:
        prepared: the model in one piece.
        budget: bytes.
        whole_stacks: stream expert stacks with their layers all the same.

    Raises:
        BudgetError: no tiling fits; carries that minimum.
    """
    apart = None if whole_stacks else on_demand(prepared)
    if apart is None:
        return _fit(prepared, budget)
    if not prepared.holds_all(budget):
        return _fit(apart, budget)
    measured = prepared.measured
    prepared.least = measured.least if measured is not None else None
    if prepared.least is None:
        candidates = tileable(apart.module, apart.matched, apart.trace, apart.unfused)
        _least(apart, _ladder(apart, candidates, _strip_levels(apart)[-1]))
        prepared.least = apart.least
        if measured is not None:
            measured.least = apart.least  # kept with the first measurements
    return prepared


def _fit(prepared: Prepared, budget: int) -> Prepared:
    whole = prepared.check(_ANY)
    known = prepared.measured.least if prepared.measured is not None else None
    if budget >= whole[0] and known is not None:
        prepared.least = known
        return _by_rows(prepared, budget)
    candidates = tileable(prepared.module, prepared.matched, prepared.trace, prepared.unfused)
    levels = _strip_levels(prepared)
    # The most strips hold the fewest activations; that is where the smallest budget is.
    smallest = _ladder(prepared, candidates, levels[-1])
    lowest = _least(prepared, smallest)
    assert prepared.least is not None
    if prepared.measured is not None:
        prepared.measured.least = prepared.least  # kept with the first measurements
    if budget >= whole[0]:
        return _by_rows(prepared, budget)
    if lowest is None or budget < prepared.least[0]:
        (_cut(prepared, candidates, lowest) if lowest and prepared.least != whole else prepared).check(
            budget
        )  # raises
    for strips in levels:
        rungs = smallest if strips is levels[-1] else _ladder(prepared, candidates, strips)
        fitting = [rung for rung in rungs if rung.floor[0] <= budget]
        # Room for two tiles: one is read while the other computes.
        roomy = [rung for rung in fitting if rung.floor[0] + rung.largest <= budget]
        if fitting:
            return _quickest(prepared, candidates, (roomy or fitting)[:_TRIED], budget)
    raise AssertionError("the lowest is among them")


def _by_rows(prepared: Prepared, budget: int) -> Prepared:
    """The same with the token tables of a decoder on the rows asked for, if it does not fit as a whole.

    One token looks up one row: a table held in memory keeps out as many bytes of weights that every token reads.
    """
    trace = prepared.trace
    if trace is None or not trace.cache_bytes or budget >= prepared.enough():
        return prepared
    found = tileable(prepared.module, prepared.matched, trace)
    tables = {
        w: owners
        for w, owners in found.items()
        if all(isinstance(owner.module, nn.Embedding) for owner in owners)
        and prepared.weights[w].entry.nbytes >= _WORTH_ROWS
    }
    tiling = plan_tiles(prepared.module, prepared.matched, tables, SMALLEST) if tables else None
    if tiling is None:
        return prepared
    tiled = _tiled(prepared, tiling)
    try:
        tiled.check(budget)  # lookups take some memory
    except BudgetError:
        return prepared
    tiled.measured, tiled.measured_under = prepared.measured, prepared.measured_under
    tiled.step_seconds = prepared.step_seconds or tiled.step_seconds  # the steps are the same
    return tiled


def _least(prepared: Prepared, smallest: list[_Rung]) -> _Rung | None:
    """Note the smallest budget that any way of cutting can do with; returns the way that cuts most."""
    whole = prepared.check(_ANY)
    lowest = min(smallest, key=lambda rung: rung.floor[0], default=None)
    prepared.least = whole if lowest is None or whole[0] <= lowest.floor[0] else lowest.floor
    return lowest


def on_demand(prepared: Prepared) -> Prepared | None:
    """The same model with its experts read on demand; None if it has no expert stacks."""
    experts = find_experts(prepared.module, prepared.matched, prepared.trace)
    if experts is None:
        return None
    trace, unfused = (
        without_experts(seen, experts, prepared.weights) if seen is not None else None
        for seen in (prepared.trace, prepared.unfused)
    )
    known = prepared.measured_under is not None
    owned = {number: [w for w in held if w not in experts.weights] for number, held in prepared.owned.items()}
    parts = dict(prepared.fixed_parts)
    parts["bookkeeping"] += _PER_CELL * sum(stack.count * len(stack.weights) for stack in experts.stacks)
    return replace(
        prepared,
        matched=Matched(by_expert(prepared.weights, experts), dict(prepared.matched.numbers)),
        trace=trace,
        unfused=unfused,
        fixed_parts=parts,
        owned={number: held for number, held in owned.items() if held},
        step_seconds=prepared.step_seconds if known or trace is None else estimate_steps(trace),
        experts=experts,
        expert_floor=experts.least,
        measured=None,  # of the model with its stacks in whole
        _table=None,
        corrections=dict(prepared.corrections),
        _groups=None,
    )


def tiled_above(prepared: Prepared, nbytes: int) -> Prepared:
    """The same model, its layers with weights of more than ``nbytes`` bytes in tiles of at most that; no tables."""
    found = tileable(prepared.module, prepared.matched, prepared.trace, prepared.unfused)
    large = {
        w: owners
        for w, owners in found.items()
        if prepared.weights[w].entry.nbytes > nbytes
        and not any(isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)) for owner in owners)
    }
    tiling = plan_tiles(prepared.module, prepared.matched, large, nbytes) if large else None
    return prepared if tiling is None else _tiled(prepared, tiling)


def _strip_levels(prepared: Prepared) -> list[dict[int, int]]:
    """Strips for convolutions whose workspaces set the peak: none first, then for lower and lower peaks."""
    levels: list[dict[int, int]] = [{}]
    trace = prepared.trace
    if trace is None:
        return levels
    lowest = trace.activation_bytes
    for share in _PEAKS:
        strips = plan_strips(prepared.module, trace, int(trace.activation_bytes * share))
        tiling = plan_tiles(prepared.module, prepared.matched, {}, _ANY, strips)
        peak = expand(trace, tiling, prepared.module).activation_bytes if tiling is not None else lowest
        if peak < lowest * 0.97:  # other operators may set the peak as well
            lowest = peak
            levels.append(strips)
    return levels


def _quickest(prepared: Prepared, candidates: dict[int, list[Owner]], rungs: list[_Rung], budget: int) -> Prepared:
    best: tuple[float, Prepared] | None = None
    for rung in rungs:
        tiled = _cut(prepared, candidates, rung)
        try:
            seconds = tiled.choose(Machine(bandwidth=_BANDWIDTH), budget)[0].predicted_latency
        except BudgetError:  # a scheme other than the best may need more
            seconds = float("inf")
        if best is None or seconds < best[0] * 0.99:
            best = seconds, tiled
    assert best is not None
    return best[1]


def _ladder(prepared: Prepared, candidates: dict[int, list[Owner]], strips: dict[int, int]) -> list[_Rung]:
    """The sizes of tile worth trying with these strips, the largest first."""
    largest = max((prepared.weights[w].entry.nbytes for w in candidates), default=0)
    limit = SMALLEST
    while limit < largest:
        limit *= 2
    rungs: list[_Rung] = []
    while limit >= SMALLEST:
        tiling = plan_tiles(prepared.module, prepared.matched, candidates, limit, strips)
        if tiling is not None:
            floor = _tiled(prepared, tiling).check(_ANY)
            rungs.append(_Rung(limit, strips, floor, tiling.largest))
            if floor[0] > min(rung.floor[0] for rung in rungs):
                break  # ever more tiles take more memory themselves than they free
        limit //= 2
    return rungs


def _cut(prepared: Prepared, candidates: dict[int, list[Owner]], rung: _Rung) -> Prepared:
    tiling = plan_tiles(prepared.module, prepared.matched, candidates, rung.limit, rung.strips)
    assert tiling is not None
    return _tiled(prepared, tiling)


def _tiled(prepared: Prepared, tiling: Tiling) -> Prepared:
    trace = prepared.trace
    if trace is not None:
        trace = unfuse_trace(trace, prepared.unfused, prepared.module, tiling.unfused)
        trace = expand(trace, tiling, prepared.module)
    parts, storage = dict(prepared.fixed_parts), prepared.storage
    tiles = [tiling.weights[t].entry for t in range(len(prepared.weights), len(tiling.weights))]
    parts["bookkeeping"] += len(tiles) * _PER_TILE
    if any(layer.strips > 1 for layer in tiling.layers):
        parts["strips"] = _STRIPS
    if trace is None:  # else what lookups take is in the peak of the pass
        tables = [layer.kind for layer in tiling.layers if layer.table]
        parts["lookups"] = gather_bytes(tables[0], 0, 0) if tables else 0
    if any(tile.offset % PAGE for tile in tiles):
        storage = storage.for_copies()
        parts["staging"] = storage.staging_bytes
    return replace(
        prepared,
        storage=storage,
        matched=Matched(list(tiling.weights), dict(prepared.matched.numbers)),
        trace=trace,
        fixed_parts=parts,
        owned=tiling.owned(prepared.owned),
        step_seconds=estimate_steps(trace) if trace is not None else (),
        tiling=tiling,
        measured=None,  # of the model in whole layers
        measured_under=None,
        _table=None,
        corrections=dict(prepared.corrections),
        _groups=None,
    )
