"""From the records of children to medians, ratios and physical bounds."""

from __future__ import annotations

import statistics
from typing import Any

Cell = dict[str, Any]


def derive(results: list[dict[str, Any]]) -> list[Cell]:
    """One cell per model and budget.

    ============================ =================================================================
    key                          meaning
    ============================ =================================================================
    model, budget                names
    weight_bytes, budget_bytes   bytes
    bandwidth                    bytes per second, median of the direct reads of this model's run
    resident_s, load_file_s      plain PyTorch: steady pass; first answer with ``load_file``
    non_weight_bytes             memory besides weights: the less of plain PyTorch's and narrowboat's
    must_read_bytes              weights - (budget - non_weight), what no scheme can avoid reading
    must_read_s                  that over the bandwidth
    bound_s                      max(resident_s, must_read_s)
    rows                         by subject, see ``_row``
    ============================ =================================================================
    """
    return [_cell(result, budget) for result in results for budget in result["budgets"]]


def _cell(result: dict[str, Any], budget: dict[str, Any]) -> Cell:
    weights = result["weight_bytes"]
    at_budget = [r for r in result["records"] if r["budget_bytes"] == budget["bytes"]]
    residents = [r for r in at_budget if r["subject"] == "resident"]
    resident_s = _median(r["steady_s"] for r in residents)
    bandwidth = statistics.median(result["bandwidths"])
    non_weight = _non_weight(at_budget, weights)
    must_read = min(weights, max(0, weights - max(0, budget["bytes"] - non_weight)))
    reference = _reference(result["records"])
    bound = max(resident_s or 0.0, must_read / bandwidth)
    subjects = list(dict.fromkeys(r["subject"] for r in at_budget))
    return {
        "model": result["model"],
        "budget": budget["label"],
        "divisor": budget["divisor"],
        "weight_bytes": weights,
        "budget_bytes": budget["bytes"],
        "min_budget_bytes": result["min_budget_bytes"],
        "bandwidth": bandwidth,
        "resident_s": resident_s,
        "load_file_s": _median(r["first_s"] for r in residents),
        "non_weight_bytes": non_weight,
        "must_read_bytes": must_read,
        "must_read_s": must_read / bandwidth,
        "bound_s": bound,
        "rows": {
            s: _row([r for r in at_budget if r["subject"] == s], residents, must_read, bandwidth, reference)
            for s in subjects
        },
    }


def _row(
    records: list[dict[str, Any]],
    residents: list[dict[str, Any]],
    must_read: int,
    bandwidth: float,
    reference: str | None,
) -> dict[str, Any]:
    """One subject in one cell.

    Ratios are medians over rounds of ratios within a round: the machine's speed changes from minute to minute, and a
    subject measured in one round only must not be compared with another round's plain PyTorch. ``status`` is the first
    that is not ``"ok"``; ``exact`` is None where there was no output; ``difference`` is the largest from the plain
    output, relative to its largest value; ``own_bound_ratio`` takes the bytes that narrowboat did read instead of
    those it had to.
    """
    steady = _median(r["steady_s"] for r in records)
    failed = next((r for r in records if r["status"] != "ok"), None)
    outputs = {digest for r in records for digest in r["outputs"][1 if r["subject"] == "resident" else 0 :]}
    stats = [r["stats"] for r in records if r["stats"]]
    read = _median(
        statistics.median(s["bytes_read"][len(s["bytes_read"]) // 2 :]) for s in stats if s.get("bytes_read")
    )
    predicted = _median(s.get("predicted_latency_ms") for s in stats)
    no_plan = _median(s.get("bound_ms") for s in stats)
    plain = {r["round"]: r for r in residents}

    def over(key: str, at_least: float = 0.0) -> float | None:
        beside = ((r[key], plain.get(r["round"], {}).get(key)) for r in records)
        return _median(value / max(base, at_least) for value, base in beside if value is not None and base)

    return {
        "status": failed["status"] if failed else "ok",
        "detail": failed["detail"] if failed else "",
        "children": len(records),
        "passes": sum(len(r["pass_s"]) for r in records),
        "steady_s": steady,
        "first_s": _median(r["first_s"] for r in records),
        "ratio": over("steady_s"),
        "bound_ratio": over("steady_s", must_read / bandwidth),
        "own_bound_ratio": over("steady_s", read / bandwidth) if read is not None else None,
        "first_ratio": over("first_s"),
        "bytes_read": read,
        "predicted_s": predicted / 1e3 if predicted is not None else None,
        "plan_bound_s": no_plan / 1e3 if no_plan is not None else None,
        "prediction_ratio": _ratio(steady, predicted / 1e3 if predicted is not None else None),
        "peak_bytes": max((r["peak_bytes"] for r in records if r["peak_bytes"] is not None), default=None),
        "charged_peak_bytes": max(
            (r["charged_peak_bytes"] for r in records if r["charged_peak_bytes"] is not None), default=None
        ),
        "page_cache_growth": max((r["page_cache_growth"] for r in records), default=None),
        "exact": outputs == {reference} if outputs else None,
        "difference": max((r["difference"] for r in records if r["difference"] is not None), default=None),
        "direct_io": all(s.get("direct_io", False) for s in stats) if stats else None,
        "copied_bytes": max((s.get("copied_bytes", 0) for s in stats), default=0),
    }


def _reference(records: list[dict[str, Any]]) -> str | None:
    """The digest of plain PyTorch's output with everything in ordinary memory."""
    return next((r["outputs"][-1] for r in records if r["subject"] == "resident" and r["outputs"]), None)


def _non_weight(records: list[dict[str, Any]], weights: int) -> int:
    found = [r["peak_bytes"] - weights for r in records if r["subject"] == "resident" and r["peak_bytes"] is not None]
    found += [
        r["peak_bytes"] - r["stats"]["resident_bytes"] - r["stats"]["window_bytes"]
        for r in records
        if r["subject"] == "narrowboat" and r["stats"] and r["peak_bytes"] is not None
    ]
    return max(0, min(found, default=0))


def _median(values: Any) -> float | None:
    kept = [v for v in values if v is not None]
    return statistics.median(kept) if kept else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
