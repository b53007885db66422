"""What the benchmark must show, each as a verdict with its numbers."""

from __future__ import annotations

from typing import Any

from inference_kit.subjects import RIVALS
from narrowboat.quantities import format_bytes, format_seconds

NEAR_RESIDENT = 1.05
NEAR_BOUND = 1.10
AHEAD = 1.8
LIKE_SIZE = (0.5, 2.0)
CACHE_GROWTH = 1 << 20

Verdict = dict[str, Any]


def check(cells: list[dict[str, Any]]) -> list[Verdict]:
    """Every verdict, cell by cell: ``what``, ``where``, ``passed``, ``numbers``."""
    return [verdict for cell in cells for verdict in _cell(cell)]


def _cell(cell: dict[str, Any]) -> list[Verdict]:
    where = f"{cell['model']} at {cell['budget']}"
    rows = cell["rows"]
    ours = rows.get("narrowboat")
    verdicts: list[Verdict] = []

    def add(what: str, passed: bool, numbers: str) -> None:
        verdicts.append({"what": what, "where": where, "passed": passed, "numbers": numbers})

    for name in ("narrowboat", "narrowboat_unpacked"):
        row = rows.get(name)
        if row is None or row["peak_bytes"] is None:
            continue
        add(
            f"{name}: peak memory within the budget",
            row["peak_bytes"] <= cell["budget_bytes"],
            f"{format_bytes(row['peak_bytes'])} of {format_bytes(cell['budget_bytes'])}",
        )
        if row["direct_io"]:
            add(
                f"{name}: page cache of the file grows by less than 1 MiB",
                row["page_cache_growth"] < CACHE_GROWTH,
                format_bytes(row["page_cache_growth"]),
            )
    if ours is None:
        return verdicts
    if ours["steady_s"] is None or cell["resident_s"] is None:
        add("narrowboat: runs", False, f"{ours['status']}: {ours['detail']}")
        return verdicts
    plain = cell["resident_s"]
    add(
        "the same bits as plain PyTorch",
        bool(ours["exact"]),
        f"largest difference {_number(ours['difference'], '.2g')}",
    )
    reading = f"reading {format_seconds(cell['must_read_s'])}, computing {format_seconds(plain)}"
    if cell["must_read_s"] < plain:
        add(
            f"at most {NEAR_RESIDENT} x plain PyTorch",
            ours["ratio"] <= NEAR_RESIDENT,
            f"{ours['ratio']:.3f} x; {reading}",
        )
    else:
        add(
            f"at most {NEAR_BOUND:.2f} x the physical bound",
            ours["bound_ratio"] <= NEAR_BOUND,
            f"{ours['bound_ratio']:.3f} x, by bytes it read {_number(ours['own_bound_ratio'], '.3f')} x; {reading}",
        )
    times = {name: rows[name]["ratio"] for name in RIVALS if name in rows and rows[name]["ratio"] is not None}
    if times:
        best = min(times, key=lambda name: times[name])
        gain = times[best] / ours["ratio"]
        add("not slower than mmap and accelerate", gain >= 1.0, f"{gain:.2f} x as fast as {best}, the best of them")
        if LIKE_SIZE[0] <= cell["must_read_s"] / plain <= LIKE_SIZE[1]:
            add(
                f"at least {AHEAD} x faster than the best of mmap and accelerate",
                gain >= AHEAD,
                f"{gain:.2f} x ({best}); {reading}",
            )
    if ours["first_s"] is not None and cell["load_file_s"] is not None:
        add(
            "first answer no later than load_file + plain forward",
            ours["first_ratio"] <= 1.0,
            f"{ours['first_ratio']:.2f} x; "
            f"{format_seconds(ours['first_s'])} against {format_seconds(cell['load_file_s'])}",
        )
    return verdicts


def _number(value: float | None, form: str) -> str:
    """A number, or a word where a child was stopped before it could tell."""
    return "unknown" if value is None else format(value, form)
