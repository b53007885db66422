"""What ``benchmarks/plan.py`` makes of its records: checked on records made by hand."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("accelerate")

from plan_kit.random_changes import changes
from plan_kit.verdicts import cells, verdicts


def plan(label: str, scheme: str, seconds: float, foreseen: float, **other: Any) -> dict[str, Any]:
    return {
        "kind": "plan", "round": 0, "budget": 100, "label": label, "scheme": scheme, "ablation": "",
        "seconds": seconds, "foreseen": foreseen, "predicted": seconds,
        "bound": 0.5, "gap": 0.0, "bytes_read": 1, "policy": "default", "tiled": 0, "digest": "d", **other,
    }  # fmt: skip


def result(*rows: dict[str, Any], resident: float = 1.0) -> dict[str, Any]:
    measured = {"kind": "resident", "round": 0, "seconds": resident, "digest": "d"}
    return {"model": "m", "profile": {"seconds": 1.0}, "rows": [measured, *rows]}


def verdict(found: list[dict[str, Any]], part: str) -> dict[str, Any]:
    return next(v for v in found if part in v["what"])


def test_ratios_are_taken_over_plain_pytorch_of_the_same_round_and_over_the_bound() -> None:
    (cell,) = cells(result(plan("curve", "best", 3.0, 2.0, bound=2.5), resident=2.0))
    assert cell["foreseen_error"] == pytest.approx(2 / 3 - 1)
    assert cell["ratio"] == 1.5
    assert cell["over_bound"] == 1.2


def test_schemes_have_to_come_in_the_order_foreseen() -> None:
    rows = [plan("1/2", "best", 1.0, 1.0), plan("1/2", "swapnet", 2.0, 1.5), plan("1/2", "first-resident", 1.5, 1.8)]
    found = verdicts(cells(result(*rows)), None)
    assert not verdict(found, "order of schemes")["passed"]
    assert verdict(found, "order of schemes")["numbers"] == "2 of 3"
    assert verdict(found, "never slower")["passed"]
    assert verdict(found, "as fast somewhere")["passed"]


def test_a_wrong_answer_or_an_overrun_fails() -> None:
    live = {
        "changes": 3, "passes": 9, "wrong": 1, "worst_over": 1, "worst_first_over": -1,
        "switch_median": 0.001, "switch_worst": 0.06,
    }  # fmt: skip
    found = verdicts([], live)
    assert [v["passed"] for v in found] == [False, False, True, False]


def test_other_bits_are_seen() -> None:
    (cell,) = cells(result(plan("curve", "best", 1.0, 1.0, digest="other")))
    assert not cell["exact"]


def test_changes_fall_on_different_passes_within_the_range() -> None:
    found = changes(10, 1000, passes=50, count=20)
    assert len(found) == 20
    assert all(0 < number < 50 and 10 <= budget <= 1000 for number, budget in found.items())
