"""Figures of ``benchmarks/inference.py``: ratios over plain PyTorch, and over what must be read."""

from __future__ import annotations

from typing import Any

import pytest

from inference_kit.derive import derive

MIB = 1 << 20


def record(subject: str, seconds: float, number: int = 0) -> dict[str, Any]:
    mine = subject == "narrowboat"
    return {
        "subject": subject,
        "round": number,
        "budget_bytes": 60 * MIB,
        "steady_s": seconds,
        "first_s": 2 * seconds,
        "pass_s": [2 * seconds, seconds],
        "outputs": ["digest"],
        "status": "ok",
        "detail": "",
        "stats": {"bytes_read": [90 * MIB], "resident_bytes": 10 * MIB, "window_bytes": 40 * MIB, "bound_ms": 900.0}
        if mine
        else None,
        "peak_bytes": (60 if mine else 110) * MIB,
        "charged_peak_bytes": None,
        "page_cache_growth": 0,
        "difference": None,
    }


def cell(*records: dict[str, Any]) -> dict[str, Any]:
    result = {
        "model": "model",
        "weight_bytes": 100 * MIB,
        "min_budget_bytes": 30 * MIB,
        "bandwidths": [50.0 * MIB],
        "budgets": [{"bytes": 60 * MIB, "label": "60 MiB", "divisor": 2}],
        "records": list(records),
    }
    (found,) = derive([result])
    return found


def test_a_pass_is_held_against_the_larger_of_computing_and_reading() -> None:
    # 10 MiB are not for weights: 50 of 100 MiB have to be read, which takes a second.
    waits = cell(record("resident", 0.5), record("narrowboat", 1.1))
    assert waits["must_read_bytes"] == 50 * MIB
    row = waits["rows"]["narrowboat"]
    assert row["ratio"] == pytest.approx(2.2)
    assert row["bound_ratio"] == pytest.approx(1.1)
    assert row["own_bound_ratio"] == pytest.approx(1.1 / 1.8)
    assert row["plan_bound_s"] == pytest.approx(0.9)
    computes = cell(record("resident", 2.0), record("narrowboat", 2.1))
    assert computes["rows"]["narrowboat"]["bound_ratio"] == pytest.approx(1.05)


def test_ratios_stay_within_a_round() -> None:
    drifting = cell(
        record("resident", 2.0), record("narrowboat", 2.2), record("resident", 8.0, 1), record("narrowboat", 8.8, 1)
    )
    assert drifting["rows"]["narrowboat"]["bound_ratio"] == pytest.approx(1.1)
