"""What the benchmark must show, each as a verdict with its numbers."""

from __future__ import annotations

from typing import Any

from generate_kit.subjects import SUBJECTS
from narrowboat.quantities import format_bytes, format_seconds

OF_BOUND = 0.92
AHEAD = 1.8
NEAR_BOUND = 1.10
MAP_GAIN = 3.0

Verdict = dict[str, Any]


def check_decoder(cell: dict[str, Any]) -> list[Verdict]:
    """The decoder's verdicts: ``what``, ``where``, ``passed``, ``numbers``."""
    where = f"{cell['model']} at 1/{cell['divisor']:g}"
    rows = cell["rows"]
    verdicts: list[Verdict] = []

    def add(what: str, passed: bool, numbers: str) -> None:
        verdicts.append({"what": what, "where": where, "passed": passed, "numbers": numbers})

    ours = rows.get("narrowboat")
    if ours is None:
        return verdicts
    for name in ("narrowboat", "narrowboat_unpacked"):
        row = rows.get(name)
        if row is None:
            continue
        add(
            f"{name}: tokens identical to plain transformers'",
            bool(row["same"]) and row["complete"],
            f"{row['fewest_tokens']} of {cell['new_tokens']} tokens, {_same(row)}",
        )
        if row["peak_bytes"] is not None:
            add(
                f"{name}: peak memory within the budget",
                row["peak_bytes"] <= cell["budget_bytes"],
                f"{format_bytes(row['peak_bytes'])} of {format_bytes(cell['budget_bytes'])}",
            )
    shares = ours["of_bound"]
    add(
        f"at least {OF_BOUND} of bandwidth / bytes that must be read per token",
        shares["checked"] is not None and shares["checked"] >= OF_BOUND,
        ", ".join(f"{_number(share)} ({formula})" for formula, share in shares.items()),
    )
    for family in ("accelerate", "airllm"):
        add(f"at least {AHEAD} x {family}'s best", *_ahead(rows, family))
    return verdicts


def _ahead(rows: dict[str, Any], family: str) -> tuple[bool, str]:
    """Whether narrowboat is ahead of the fastest of a family, and by how much; who was killed is behind."""
    tried = {name: row for name, row in rows.items() if SUBJECTS[name].family == family}
    gains = {name: row["gain"] for name, row in tried.items() if row["gain"] is not None}
    rest = ", ".join(f"{name} {tried[name]['status']}" for name in tried if name not in gains)
    if not gains:
        killed = bool(tried) and all(row["status"] == "oom" for row in tried.values())
        return killed, rest or "not measured"
    best = min(gains, key=lambda name: gains[name])
    return gains[best] >= AHEAD, f"{gains[best]:.2f} x ({best})" + (f"; {rest}" if rest else "")


def check_single(cell: dict[str, Any], where: str) -> list[Verdict]:
    """A streamed pass against max(plain computing, reading what must be read); a cell of ``inference_kit.derive``."""
    row = cell["rows"]["narrowboat"]
    ratio, plain = row["bound_ratio"], cell["resident_s"]
    numbers = f"{row['status']}: {row['detail']}"
    if ratio is not None:
        numbers = (
            f"{ratio:.3f} x, by bytes it read {_number(row['own_bound_ratio'])} x; "
            f"reading {format_seconds(cell['must_read_s'])}, computing {format_seconds(plain)}"
        )
        if row["plan_bound_s"]:
            numbers += f"; no plan in this budget could do it in less than {format_seconds(row['plan_bound_s'])}"
    return [
        {
            "what": f"within {NEAR_BOUND:.2f} x of max(plain computing, reading what must be read)",
            "where": where,
            "passed": ratio is not None and ratio <= NEAR_BOUND,
            "numbers": numbers,
        },
        {
            "what": "the same bits as plain PyTorch",
            "where": where,
            "passed": bool(row["exact"]),
            "numbers": f"largest difference {_number(row['difference'])}",
        },
    ]


def check_map(name: str, inputs: int, cell: dict[str, Any]) -> list[Verdict]:
    """Sweeps against single passes.

    The gain is asked only where reading takes so many times as long as computing: elsewhere no sweep can have it.

    Args:
        name: the model.
        inputs: how many.
        cell: of ``derive_map``.
    """
    where = f"map, {name}, {inputs} inputs"
    bound = cell["read_over_compute"]
    verdicts = [
        {
            "what": "the same bits as single passes",
            "where": where,
            "passed": cell["exact"],
            "numbers": f"{cell['alone']} inputs went alone",
        }
    ]
    if bound is not None and bound > MAP_GAIN:
        verdicts.append(
            {
                "what": f"at least {MAP_GAIN:g} x the throughput of single passes",
                "where": where,
                "passed": cell["ratio"] >= MAP_GAIN,
                "numbers": f"{cell['ratio']:.2f} x in groups of {cell['group']}; in a single pass reading is "
                f"{_number(bound)} x computing",
            }
        )
    return verdicts


def _same(row: dict[str, Any]) -> str:
    return {True: "all the same", False: "some differ", None: "nothing to compare"}[row["same"]]


def _number(value: float | None) -> str:
    """A number, or a word where a child was stopped before it could tell."""
    return "unknown" if value is None else f"{value:.3f}"
