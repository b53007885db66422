"""``narrowboat profile``, and what ``narrowboat plan`` makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from narrowboat.machine.malloc import MallocPolicy

MODEL = "tiny_model:factory"
WEIGHTS = ("--weights", "tiny.safetensors")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWBOAT_CACHE", str(tmp_path / "cache"))


def test_blocks_are_measured_alone_and_beside_reading(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("profile", MODEL, *WEIGHTS, "--passes", "2", "-o", "p.json", "--json")
    assert finished.code == 0, finished.err
    told = finished.json()
    assert told["blocks"]
    assert all(row["compute_idle_ms"] >= 0 and row["uses"] >= 1 for row in told["blocks"])
    assert sum(told["step_seconds"]) > 0
    assert told["table"]
    # Under each allocator policy: the bytes beside the weights, and the pace.
    assert set(told["needs"]) == set(told["paces"]) == {policy.value for policy in MallocPolicy}
    assert min(told["paces"].values()) == told["paces"]["default"]
    assert all(factor >= 1 for factor in told["slowed"])
    assert set(told["identity"]) == {"weights", "model and inputs", "torch", "threads", "processor"}
    assert json.loads(Path("p.json").read_text())["step_seconds"] == told["step_seconds"]
    planned = narrowboat("plan", MODEL, *WEIGHTS, "--budget", "12MiB", "--profile", "p.json", "--json")
    assert planned.code == 0, planned.err


def test_a_profile_of_other_weights_is_refused(narrowboat: Any, tiny: Path) -> None:
    assert narrowboat("profile", MODEL, *WEIGHTS, "--passes", "1", "-o", "p.json").code == 0
    import tiny_model
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(2)
    save_file(tiny_model.factory().state_dict(), "other.safetensors")
    finished = narrowboat("plan", MODEL, "--weights", "other.safetensors", "--budget", "12MiB", "--profile", "p.json")
    assert finished.code == 1
    assert "another weights" in finished.err


def test_the_curve_is_drawn_with_measured_points(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("plan", MODEL, *WEIGHTS, "--budget", "12MiB", "--curve", "c.png", "--measure", "--json")
    assert finished.code == 0, finished.err
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert finished.json()["advice"]


def test_a_target_latency_finds_a_budget_or_says_what_can_be_had(narrowboat: Any, tiny: Path) -> None:
    found = narrowboat("plan", MODEL, *WEIGHTS, "--target-latency", "10s", "--bandwidth", "1GB", "--json")
    assert found.code == 0, found.err
    plan = found.json()
    assert plan["predicted_latency_ms"] <= 10_000
    assert plan["budget_bytes"] == plan["min_budget_bytes"]
    never = narrowboat("plan", MODEL, *WEIGHTS, "--target-latency", "1ns", "--bandwidth", "1GB")
    assert never.code == 2
    assert "no budget gives" in never.err


@pytest.mark.parametrize(
    "bad",
    [("--target-latency", "1s", "--budget", "1GiB"), ("--measure", "--budget", "1GiB"), ("--target-latency", "x")],
)
def test_options_that_contradict_are_bad_usage(narrowboat: Any, tiny: Path, bad: tuple[str, ...]) -> None:
    assert narrowboat("plan", MODEL, *WEIGHTS, *bad).code == 2
