"""From the records of children to tokens per second, ratios and bounds. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Cell = dict[str, Any]


def must_read(per_token: int, budget: int, fixed: int) -> int:
    """Bytes that every token has to read, whatever the scheme: what it uses, less what can be resident.

    Args:
        per_token: bytes of weights that a token uses.
        budget: bytes.
        fixed: bytes of the budget that weights cannot have: buffers, activations, cache, bookkeeping.
    """
    return max(0, per_token - max(0, budget - fixed))


def derive_decoder(result: dict[str, Any]) -> Cell:
    """The decoder's figures.

    ================== ===========================================================================
    key                meaning
    ================== ===========================================================================
    fixed_bytes        of narrowboat's plan (median over children)
    must_read_bytes    by name of the formula: ``checked`` is bytes_per_token - (budget - fixed),
                       ``strictest`` bytes_per_token - budget, ``all weights`` weights - budget
    bandwidth          bytes per second, median of ``storage`` over packed narrowboat's children
    direct_reads       bytes per second, the direct reads before and after them
    rows               by subject, see ``_row``
    ================== ===========================================================================
    """
    records = result["records"]
    ours = [r["stats"] for r in records if r["subject"] == "narrowboat" and r["stats"]]
    fixed = int(statistics.median(s["fixed_bytes"] for s in ours)) if ours else 0
    budget, per_token, weights = result["budget_bytes"], result["bytes_per_token"], result["weight_bytes"]
    reading = {
        "checked": must_read(per_token, budget, fixed),
        "strictest": must_read(per_token, budget, 0),
        "all weights": must_read(weights, budget, 0),
    }
    reference = next((r["ids"] for r in records if r["subject"] == "resident" and r["status"] == "ok"), None)
    names = dict.fromkeys(r["subject"] for r in records)
    kept = ("model", "weight_bytes", "bytes_per_token", "budget_bytes", "divisor", "prompt_tokens", "new_tokens")
    return {
        **{key: result[key] for key in kept},
        "fixed_bytes": fixed,
        "must_read_bytes": reading,
        "bandwidth": _median(storage(r) for r in records if r["subject"] == "narrowboat"),
        "direct_reads": result["bandwidths"],
        "rows": {name: _row(name, records, reading, reference, result["new_tokens"]) for name in names},
    }


def storage(record: dict[str, Any]) -> float | None:
    """Bytes per second that the storage could give beside a child: the most that was seen.

    That is the best of the direct reads before and after it, and the rate at which the child itself was served while
    it read: on a shared machine a neighbour may have slowed one and not the other, and a bound must not profit.
    """
    stats = record["stats"]
    seen = list(record["bandwidths"])
    if stats and (reading := _milli(_steady_median(stats["read_ms"]))):
        seen.append((_steady_median(stats["bytes_read"]) or 0.0) / reading)
    return max(seen, default=None) if record["bandwidths"] else None


def _row(
    name: str, records: list[dict[str, Any]], reading: dict[str, int], reference: list[int] | None, wanted: int
) -> dict[str, Any]:
    """One subject.

    ``of_bound`` are medians over rounds, by formula: tokens per second over what the storage allowed beside that very
    child (see ``storage``). ``gain`` is narrowboat's tokens per second over this subject's,
    within a round (median of the rounds). ``same`` compares as many tokens as it made; ``complete`` says if those
    were all.
    """
    mine = [r for r in records if r["subject"] == name]
    failed = next((r for r in mine if r["status"] != "ok"), None)
    central = {r["round"]: r["steady_s"] for r in records if r["subject"] == "narrowboat"}
    answers = [r["ids"] for r in mine if r["ids"]]
    of_bound = {
        formula: _median(
            nbytes / allowed / r["steady_s"] for r in mine if r["steady_s"] and (allowed := storage(r)) is not None
        )
        for formula, nbytes in reading.items()
    }
    seconds = _median(r["steady_s"] for r in mine)
    whole = [(len(r["token_s"]), sum(r["token_s"])) for r in mine if r["token_s"]]
    stats = [r["stats"] for r in mine if r["stats"]]
    return {
        "status": failed["status"] if failed else "ok",
        "detail": failed["detail"] if failed else "",
        "children": len(mine),
        "token_s": seconds,
        "tokens_per_s": 1 / seconds if seconds else None,
        "mean_tokens_per_s": sum(n for n, _ in whole) / sum(s for _, s in whole) if whole else None,
        "first_s": _median(r["first_s"] for r in mine),
        "of_bound": of_bound,
        "gain": _median(
            r["steady_s"] / central[r["round"]] for r in mine if r["steady_s"] and central.get(r["round"])
        ),
        "same": all(ids == (reference or [])[: len(ids)] for ids in answers) if answers and reference else None,
        "complete": bool(mine) and all(len(r["ids"]) == wanted for r in mine),
        "fewest_tokens": min((len(r["ids"]) for r in mine), default=0),
        "peak_bytes": max((r["peak_bytes"] for r in mine if r["peak_bytes"] is not None), default=None),
        "charged_peak_bytes": max(
            (r["charged_peak_bytes"] for r in mine if r["charged_peak_bytes"] is not None), default=None
        ),
        "bytes_read": _median(_steady_median(s["bytes_read"]) for s in stats),
        "stall_s": _median(_milli(_steady_median(s["stall_ms"])) for s in stats),
        "read_s": _median(_milli(_steady_median(s["read_ms"])) for s in stats),
        "predicted_s": _median(_milli(s["predicted_latency_ms"]) for s in stats),
        "resident_bytes": _median(s["resident_bytes"] for s in stats),
        "window_bytes": _median(s["window_bytes"] for s in stats),
        "tables_by_row": [table for s in stats[:1] for table, pieces in s["tiled_layers"].items() if not pieces],
    }


def derive_map(runs: list[dict[str, Any]]) -> Cell:
    """Figures of ``benchmarks/map.py``'s runs: seconds each way, the ratio, and why.

    ``read_over_compute`` says how far single passes wait for storage: seconds of reading over seconds of computing in
    a pass. A sweep computes as much for each input as a single pass does, so that ratio is about the most it can gain:
    a little more where reading beside it slows the computing of single passes.
    """
    seconds = {
        way: statistics.median(r["seconds"] for r in runs if r["way"] == way and r["seconds"])
        for way in ("single", "map")
    }
    single = [r for r in runs if r["way"] == "single"]
    swept = [r for r in runs if r["way"] == "map"]
    sweeps = [ms for r in swept for ms in r["sweep_ms"]]
    reading = _median(_steady_median(r["pass_read_ms"]) for r in single)
    computing = _median(_steady_median(r["pass_compute_ms"]) for r in single)
    return {
        "single_s": seconds["single"],
        "map_s": seconds["map"],
        "ratio": seconds["single"] / seconds["map"],
        "group": swept[-1]["group"],
        "alone": max(r["alone"] for r in swept),
        "sweep_s": _milli(statistics.median(sweeps)) if sweeps else None,
        "predicted_sweep_s": _milli(statistics.median(r["predicted_sweep_ms"] for r in swept)),
        "read_s": _milli(reading),
        "compute_s": _milli(computing),
        "read_over_compute": reading / computing if reading is not None and computing else None,
        "bytes_read_single": statistics.median(r["bytes_read"] for r in single),
        "bytes_read_map": statistics.median(r["bytes_read"] for r in swept),
        "over_budget": max(r["peak_over_budget"] for r in runs),
        "exact": len({r["digest"] for r in runs}) == 1,
    }


def _steady_median(values: list[float]) -> float | None:
    """Median of the later half, when plans have settled."""
    return statistics.median(values[len(values) // 2 :]) if values else None


def _median(values: Iterable[float | None]) -> float | None:
    kept = [v for v in values if v is not None]
    return statistics.median(kept) if kept else None


def _milli(value: float | None) -> float | None:
    return value / 1e3 if value is not None else None
