"""``narrowboat bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = "tiny_model:factory"


def test_budgets_are_measured_beside_plain_pytorch_and_a_refused_one_says_so(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat(
        "bench", MODEL, "--weights", "tiny.safetensors", "--budgets", "16KiB,11MiB",
        "--passes", 2, "--rounds", 1, "--json",
    )  # fmt: skip
    assert finished.code == 0, finished.err
    plain, refused, ours = finished.json()["rows"]
    assert (plain["subject"], plain["budget_bytes"], plain["ratio"]) == ("plain", None, 1.0)
    assert refused["latency_ms"] is None
    assert refused["min_budget_bytes"] > 16 << 10
    assert ours["budget_bytes"] == 11 << 20
    assert ours["bit_identical"] is True
    assert ours["latency_ms"] > 0 and ours["peak_bytes"] > 0
    assert [len(passes) for passes in ours["rounds"]] == [2]


def test_a_budget_that_is_none_is_wrong_usage(narrowboat: Any, tiny: Path) -> None:
    assert narrowboat("bench", MODEL, "--weights", "tiny.safetensors", "--budgets", "1MiB,many").code == 2
