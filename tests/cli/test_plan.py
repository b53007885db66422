"""``narrowboat plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MODEL = "tiny_model:factory"
WEIGHTS = ("--weights", "tiny.safetensors")


def test_it_says_what_is_resident_and_what_streams_without_running(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("plan", MODEL, *WEIGHTS, "--budget", "12MiB", "--bandwidth", "1.5GB", "--blocks", "--json")
    assert finished.code == 0, finished.err
    plan = finished.json()
    assert plan["bandwidth_bytes_per_s"] == 1.5e9
    assert plan["bandwidth_measured"] is False
    assert plan["min_budget_bytes"] <= plan["budget_bytes"] == 12 << 20
    assert len(plan["block_list"]) == plan["blocks"]
    assert sum(block["bytes"] for block in plan["block_list"]) == plan["weight_bytes"]
    assert sum(block["resident"] for block in plan["block_list"]) == plan["resident_blocks"]


def test_the_storage_is_measured_where_no_bandwidth_is_given(narrowboat: Any, tiny: Path) -> None:
    plan = narrowboat("plan", MODEL, *WEIGHTS, "--budget", "12MiB", "--json").json()
    assert plan["bandwidth_measured"] is True
    assert plan["bandwidth_bytes_per_s"] > 0


def test_a_budget_that_cannot_hold_is_exit_1_with_the_minimum(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("plan", MODEL, *WEIGHTS, "--budget", "64KiB", "--json")
    assert finished.code == 1
    error = finished.json()["error"]
    assert error["type"] == "BudgetError"
    assert error["minimum"] > 64 << 10
    assert error["limiter"]
    again = narrowboat("plan", MODEL, *WEIGHTS, "--budget", error["minimum"], "--bandwidth", "1GB", "--json")
    assert again.code == 0, again.err


def test_the_table_lists_blocks_when_asked(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("plan", MODEL, *WEIGHTS, "--budget", "12MiB", "--bandwidth", "1GB", "--blocks")
    assert finished.code == 0, finished.err
    for words in ("resident", "predicted", "layers.11", "streamed"):
        assert words in finished.out


def test_a_bandwidth_that_is_none_is_wrong_usage(narrowboat: Any, tiny: Path) -> None:
    assert narrowboat("plan", MODEL, *WEIGHTS, "--budget", "12MiB", "--bandwidth", "fast").code == 2
