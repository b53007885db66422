"""From the records to what is reported: cells, shares, ratios. Pure."""

from __future__ import annotations

import statistics
from typing import Any

from cuda_kit.bounds import best_rate, cells, medians

Records = dict[str, dict[str, Any]]


def derive(records: Records, *, is_cuda: bool) -> dict[str, Any]:
    """``cells`` of inference, ``drift`` of resident, ``bandwidth``, ``swap``, and ``training`` by setting."""
    copies = records.get("copies", {})
    into = best_rate(copies["in"]) if copies.get("in") else None
    found: dict[str, Any] = {"bandwidth": {"in": into, "out": best_rate(copies["out"]) if into else None}}
    found["cells"], found["drift"], found["storage"] = [], {}, {}
    for part in ("vit", "decoder"):
        storage = storage_rate(records, part)
        found["storage"][part] = storage
        if into:
            found["cells"] += cells(list(records.values()), part, into, storage)
        drift = _drift(records, part)
        if drift is not None:
            found["drift"][part] = drift
    found["swap"] = _swap(records.get("swap"), is_cuda)
    found["training"] = _training(records)
    return found


def storage_rate(records: Records, part: str) -> float | None:
    """Bytes per second of the storage that a model's weights were on; None if it was not measured."""
    rates = records.get(f"{part}/storage-bandwidth", {}).get("rates")
    return max(rates.values()) if rates else None


def _drift(records: Records, part: str) -> float | None:
    """Resident's latency in its last child over that in its first, the median over batch sizes."""
    first, last = (medians([records.get(f"{part}/resident/{name}", {})]) for name in ("r0", "last"))
    ratios = [last[batch] / seconds for batch, seconds in first.items() if batch in last]
    return statistics.median(ratios) if ratios else None


def _swap(record: dict[str, Any] | None, is_cuda: bool) -> dict[str, Any] | None:
    """Shares of the bandwidth that the same child measured just before."""
    if not record or not record.get("copies"):
        return None
    rates = {"evict": best_rate(record["copies"]["out"]), "restore": best_rate(record["copies"]["in"])}
    ways = {"evict": "evict", "evict_call": "evict", "restore": "restore"}
    ways |= {"evict_part": "evict", "restore_part": "restore"}
    chunks = [
        {**chunk, "share": {name: chunk["rates"][name] / rates[way] for name, way in ways.items()}}
        for chunk in record.get("chunks", [])
    ]
    return {"bandwidth": rates, "chunks": chunks, "graph": record.get("graph"), "is_cuda": is_cuda}


def _training(records: Records) -> list[dict[str, Any]]:
    """By setting, with times over plain's."""
    plain = records.get("training/plain", {})
    rows = []
    for key, record in records.items():
        if record.get("part") == "training" and record.get("subject") in ("plain", "recompute", "narrowboat"):
            step, base = record.get("step_s"), plain.get("step_s")
            peak = record.get("allocated_bytes", record.get("measured_peak_bytes"))
            rows.append(
                {
                    "setting": key.partition("/")[2],
                    "status": record["status"],
                    "detail": record["detail"],
                    "step_s": step,
                    "ratio": step / base if step and base else None,
                    "peak_bytes": peak,
                    "budget_bytes": record.get("budget_bytes"),
                    "static_bytes": record.get("static_bytes"),
                    "offloaded_bytes": record.get("offloaded_bytes"),
                    "difference": record.get("difference"),
                    "same_bits": record.get("same_bits"),
                }
            )
    return rows
