"""What was measured against what must be shown: medians over the rounds, and one verdict per demand.

*Foreseen* is what ``narrowboat plan`` says just before: from the profile, and what sessions have measured since.
*Predicted* is the plan in force, made from the session's second pass. The machines are shared, and their speed drifts
by tens of percent within minutes, so plain PyTorch runs before and after each round, and ratios stay within a round.
"""

from __future__ import annotations

import statistics
from itertools import combinations
from typing import Any

ERROR = 0.08
NEAR_RESIDENT = 1.03
NEAR_BOUND = 1.05
AHEAD = 1.15
NOISE = 0.05  # two measurements, or two predictions, so close are called equal
SWITCH = 0.050

Cell = dict[str, Any]


def cells(result: dict[str, Any]) -> list[Cell]:
    """One entry per budget, scheme and ablation of a model: medians over its rounds."""
    rounds = sorted({row["round"] for row in result["rows"]})
    resident = {
        number: [r["seconds"] for r in result["rows"] if r["kind"] == "resident" and r["round"] == number]
        for number in rounds
    }
    digests = {r["digest"] for r in result["rows"] if r["kind"] == "resident"}
    found: dict[tuple[Any, ...], list[Cell]] = {}
    for row in result["rows"]:
        if row["kind"] == "plan":
            key = (row["budget"], row["label"], row["scheme"], row["ablation"])
            found.setdefault(key, []).append(row)
    out = []
    for (budget, label, scheme, ablation), rows in found.items():
        ran = [row for row in rows if "seconds" in row]
        cell: Cell = {"model": result["model"], "budget": budget, "label": label, "scheme": scheme}
        cell["ablation"] = ablation
        if not ran:
            out.append({**cell, "refused": rows[0]["refused"]})
            continue
        cell.update(
            seconds=statistics.median(row["seconds"] for row in ran),
            resident=statistics.median(statistics.mean(resident[row["round"]]) for row in ran),
            ratio=statistics.median(row["seconds"] / statistics.mean(resident[row["round"]]) for row in ran),
            foreseen=statistics.median(row["foreseen"] for row in ran),
            foreseen_error=statistics.median(row["foreseen"] / row["seconds"] - 1 for row in ran),
            predicted_error=statistics.median(row["predicted"] / row["seconds"] - 1 for row in ran),
            over_bound=statistics.median(
                row["seconds"] / max(row["bound"], statistics.mean(resident[row["round"]])) for row in ran
            ),
            gap=max(row["gap"] for row in ran),
            bytes_read=statistics.median(row["bytes_read"] for row in ran),
            policy=ran[-1]["policy"],
            tiled=ran[-1]["tiled"],
            exact=all(row["digest"] in digests for row in ran),
        )
        out.append(cell)
    return out


def verdicts(all_cells: list[Cell], live: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One entry per demand: what, passed, numbers."""
    out: list[dict[str, Any]] = []

    def add(what: str, passed: bool, numbers: str) -> None:
        out.append({"what": what, "passed": passed, "numbers": numbers})

    ran = [c for c in all_cells if "seconds" in c]
    curve = [c for c in ran if c["label"] == "curve"]
    if curve:
        for name, what in (
            ("foreseen_error", "foreseen"),
            ("predicted_error", "predicted by the plan in force"),
        ):
            errors = [abs(c[name]) for c in curve]
            add(
                f"{what}: median absolute error at most {ERROR:.0%}",
                statistics.median(errors) <= ERROR,
                f"{statistics.median(errors):.1%} over {len(errors)} budgets, worst {max(errors):.0%}",
            )
        gap = max(c["gap"] for c in curve)
        add("plans within 1 % of the proven bound", gap <= 0.01, f"worst gap {gap:.2%}")
    _schemes(ran, add)
    for c in ran:
        if c["label"].startswith("1/") and c["scheme"] == "best" and not c["ablation"]:
            free = c["over_bound"] == c["ratio"]
            limit = NEAR_RESIDENT if free else NEAR_BOUND
            against = "plain PyTorch" if free else "the physical bound"
            add(
                f"{c['model']} at {c['label']}: at most {limit:.2f}x {against}",
                c["over_bound"] <= limit,
                f"{c['over_bound']:.2f}x ({c['ratio']:.2f}x plain)",
            )
    if live is not None:
        add(
            f"{live['changes']} random changes in {live['passes']} passes: no wrong answer",
            not live["wrong"],
            f"{live['wrong']} wrong",
        )
        add("  no pass over its budget", live["worst_over"] <= 0, f"worst {live['worst_over'] / 2**20:+.1f} MiB")
        add(
            "  the first pass after a change within its budget",
            live["worst_first_over"] <= 0,
            f"worst {live['worst_first_over'] / 2**20:+.1f} MiB",
        )
        add(
            f"  a switch takes less than {SWITCH * 1e3:.0f} ms",
            live["switch_worst"] < SWITCH,
            f"median {live['switch_median'] * 1e3:.1f} ms, worst {live['switch_worst'] * 1e3:.1f} ms",
        )
    return out


def _schemes(ran: list[Cell], add: Any) -> None:
    pairs = agreed = 0
    slower, gains = [], []
    for key in sorted({(c["model"], c["label"]) for c in ran if c["label"] != "curve"}):
        at = {c["scheme"]: c for c in ran if (c["model"], c["label"]) == key and not c["ablation"]}
        for a, b in combinations(at.values(), 2):
            if _apart(a["foreseen"], b["foreseen"]) and _apart(a["seconds"], b["seconds"]):
                pairs += 1
                agreed += (a["foreseen"] < b["foreseen"]) == (a["seconds"] < b["seconds"])
        best = at.get("best")
        for name in ("swapnet", "first-resident"):
            if best is not None and name in at:
                gain = at[name]["seconds"] / best["seconds"]
                gains.append((gain, f"{key[0]} at {key[1]} over {name}"))
                if gain < 1 - NOISE:
                    slower.append(f"{key[0]} at {key[1]}: {1 / gain:.2f}x {name}")
    if pairs:
        add(
            f"the predicted order of schemes is the measured one (pairs {NOISE:.0%} apart)",
            agreed == pairs,
            f"{agreed} of {pairs}",
        )
    if gains:
        add("never slower than swapnet or first-resident", not slower, "; ".join(slower) or "none")
        gain, where = max(gains)
        add(f"at least {AHEAD:.2f}x as fast somewhere", gain >= AHEAD, f"{gain:.2f}x: {where}")


def _apart(a: float, b: float) -> bool:
    return abs(a / b - 1) > NOISE
