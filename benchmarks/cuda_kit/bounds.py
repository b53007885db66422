"""From records to latencies, ratios and physical bounds. Pure.

A pass within a budget takes at least as long as with everything on the device, and as copying what it copies does:

    bound = max(resident's latency, bytes copied per pass / measured bandwidth)
    least = max(resident's latency, (weights - those the device has room for) / measured bandwidth)

The first is told by the bytes that narrowboat does copy, the second by those that nobody with that budget can avoid.
"""

from __future__ import annotations

import statistics
from typing import Any

Record = dict[str, Any]
Cell = dict[str, Any]

LIKE_SIZE = (0.5, 2.0)


def best_rate(rates: dict[str, float]) -> float:
    """Bytes per second that count, of those by size."""
    return max(rates.values())


def bound(resident: float | None, nbytes: float, bandwidth: float) -> float:
    """Seconds that a pass takes at least."""
    return max(resident or 0.0, nbytes / bandwidth)


def medians(records: list[Record]) -> dict[int, float]:
    """Seconds by batch size, the median over children."""
    seen: dict[int, list[float]] = {}
    for record in records:
        for batch in record.get("batches", ()):
            if batch["status"] == "ok":
                seen.setdefault(batch["batch"], []).append(batch["median_s"])
    return {batch: statistics.median(values) for batch, values in sorted(seen.items())}


def cells(records: list[Record], part: str, into: float, storage: float | None) -> list[Cell]:
    """One cell per budget and batch size of one model, then those from storage and with unified memory.

    Args:
        records: of children, those of this part among them.
        part: the model's name.
        into: bytes per second from pinned memory to the device.
        storage: bytes per second from storage.
    """
    mine = [record for record in records if record.get("part") == part]
    plain = [record for record in mine if record["subject"] == "resident"]
    ours = [record for record in mine if record["subject"] == "narrowboat"]
    residents = medians(plain)
    digests: dict[int, set[str]] = {}
    for each in (b for r in plain for b in r["batches"] if b["status"] == "ok"):
        digests.setdefault(each["batch"], set()).update(each["digests"])
    found: list[Cell] = []
    for kind in ("host", "storage", "unified"):
        chosen = [record for record in ours if record["kind"] == kind]
        for divisor in dict.fromkeys(record["divisor"] for record in chosen):
            here = [record for record in chosen if record["divisor"] == divisor]
            for size in dict.fromkeys(b["batch"] for r in here for b in r["batches"]):
                cell = _cell(here, size, residents.get(size), into, storage if kind == "storage" else None)
                cell |= {"model": part, "kind": kind, "divisor": divisor, "batch": size}
                cell["exact"] = _exact(here, size, digests.get(size))
                cell["libraries_bytes"] = _libraries(plain, size)
                cell["resident_peak_bytes"] = _most(
                    b.get("peak_bytes") for r in plain for b in r["batches"] if b["batch"] == size
                )
                cell["peers"] = _peers(mine, divisor, size, residents.get(size)) if kind == "host" else {}
                found.append(cell)
    return found


def _cell(ours: list[Record], size: int, resident: float | None, into: float, storage: float | None) -> Cell:
    tries = [b for r in ours for b in r["batches"] if b["batch"] == size]
    good = [b for b in tries if b["status"] == "ok"]
    cell: Cell = {"status": "ok", "detail": "", "resident_s": resident, "seconds": None, "ratio": None}
    failed = next((b for b in tries if b["status"] != "ok"), None)
    if failed is not None:
        cell |= {"status": failed["status"], "detail": failed["detail"]}
    if not good:
        return cell
    seconds = statistics.median(b["median_s"] for b in good)
    copied, read = (statistics.median(b[name] for b in good) for name in ("copied_bytes", "read_bytes"))
    weights = ours[0]["weight_bytes"]
    given = good[-1].get("given_bytes")
    room = given - good[-1]["fixed_at_first_bytes"] if given is not None else weights
    at_least = bound(resident, weights - room, into)
    own = bound(resident, copied, into)
    if storage:
        own = max(own, read / storage)
    copy_ratio = copied / into / resident if resident else None
    return cell | {
        "seconds": seconds,
        "copied_bytes": copied,
        "read_bytes": read,
        "must_copy_bytes": weights - room,
        "weights_budget_bytes": room,
        "budget_bytes": given,
        "smallest": good[-1].get("smallest", False),
        "least_budget_bytes": good[-1].get("least_bytes"),
        "fixed_bytes": good[-1]["stats"].get("fixed_bytes"),
        "own_peak_bytes": max(b["stats"].get("peak_bytes", 0) for b in good),
        "peak_bytes": _most(b["peak_bytes"] - b["outside_bytes"] for b in good if b.get("peak_bytes") is not None),
        "bound_s": own,
        "least_s": at_least,
        "copies_over_computing": copy_ratio,
        "ratio": seconds / resident if resident else None,
        "bound_ratio": seconds / own if own else None,
        "least_ratio": seconds / at_least if at_least else None,
        "difference": _most(b.get("difference") for b in good),
        "predicted_s": statistics.median(b["stats"]["predicted_latency_ms"] for b in good) / 1e3,
    }


def _exact(ours: list[Record], size: int, want: set[str] | None) -> bool | None:
    """Whether every answer is resident's, bit for bit; None where there is none to compare."""
    got = {d for r in ours for b in r["batches"] if b["batch"] == size and b["status"] == "ok" for d in b["digests"]}
    return None if not got or not want else got <= want


def _libraries(plain: list[Record], size: int) -> int | None:
    """Bytes of the device beside tensors, as resident's process shows them: context, kernels, handles."""
    found = [
        b["peak_bytes"] - b["reserved_bytes"]
        for r in plain
        for b in r["batches"]
        if b["batch"] == size and b.get("peak_bytes") is not None and b.get("reserved_bytes") is not None
    ]
    return max(found, default=None)


def _peers(records: list[Record], divisor: float | None, size: int, resident: float | None) -> dict[str, Any]:
    """The others at this batch size, by name."""
    rows: dict[str, Any] = {}
    for record in records:
        name = record["subject"]
        if record["kind"] != "peer" or record["divisor"] not in (None, divisor):
            continue
        row = rows.setdefault(name, {"status": record["status"], "detail": record["detail"], "tries": []})
        for batch in record["batches"]:
            if batch["batch"] == size:
                row["tries"].append(batch)
    for row in rows.values():
        tries = row.pop("tries")
        good = [b["median_s"] for b in tries if b["status"] == "ok"]
        failed = next((b for b in tries if b["status"] != "ok"), None)
        if failed is not None and not good:
            row |= {"status": failed["status"], "detail": failed["detail"]}
        row["seconds"] = statistics.median(good) if good else None
        row["ratio"] = row["seconds"] / resident if good and resident else None
        row["peak_bytes"] = _most(b.get("peak_bytes") for b in tries)
        row["difference"] = _most(b.get("difference") for b in tries)
    return rows


def best_peer(cell: Cell) -> tuple[str, float] | None:
    """The quickest of the others, and its seconds."""
    times = {name: row["seconds"] for name, row in cell["peers"].items() if row["seconds"]}
    return min(times.items(), key=lambda item: item[1]) if times else None


def _most(values: Any) -> Any:
    return max((value for value in values if value is not None), default=None)
