"""What ``benchmarks/generate.py`` makes of its records: pure arithmetic, checked on records made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from generate_kit.checks import check_decoder, check_map, check_single
from generate_kit.derive import derive_decoder, derive_map, must_read, storage
from generate_kit.measure import Clock, prompt_ids
from generate_kit.report import decoder_facts, decoder_rows, map_rows

GB = 10**9
STATS: dict[str, Any] = {
    "fixed_bytes": GB // 10,
    "bytes_read": [2 * GB, 3 * GB // 2, 3 * GB // 2],
    "read_ms": [1000.0, 1000.0, 1000.0],
    "stall_ms": [0.0, 500.0, 500.0],
    "predicted_latency_ms": 1000.0,
    "resident_bytes": GB // 2,
    "window_bytes": GB // 10,
    "tiled_layers": {"model.embed_tokens": 0, "lm_head": 3},
}


def record(subject: str, seconds: float | None, number: int = 0, **changes: Any) -> dict[str, Any]:
    ours = subject.startswith("narrowboat")
    return {
        "subject": subject,
        "round": number,
        "status": "ok",
        "detail": "",
        "first_s": 5.0 if seconds else None,
        "token_s": [seconds] * 3 if seconds else [],
        "steady_s": seconds,
        "ids": [7, 8, 9, 10],
        "peak_bytes": GB // 2,
        "charged_peak_bytes": None,
        "stats": STATS if ours else {},
        "bandwidths": [1.6 * GB, 1.8 * GB] if ours else [],
        "child_seconds": 9.0,
        **changes,
    }


def result(*records: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": "llama",
        "weight_bytes": 22 * GB // 10,
        "bytes_per_token": 2 * GB,
        "budget_bytes": 6 * GB // 10,
        "divisor": 4,
        "prompt_tokens": 8,
        "new_tokens": 4,
        "bandwidths": [b for r in records for b in r["bandwidths"]],
        "records": list(records),
    }


def test_what_must_be_read_is_what_is_used_less_what_can_be_resident() -> None:
    assert must_read(2000, 600, 100) == 1500
    assert must_read(2000, 600, 700) == 2000, "the fixed part can leave nothing for weights, not less"
    assert must_read(2000, 6000, 100) == 0


def test_tokens_per_second_are_held_against_what_storage_allowed_beside_that_child() -> None:
    cell = derive_decoder(result(record("resident", 0.3), record("narrowboat", 1.0), record("narrowboat", 0.9, 1)))
    row = cell["rows"]["narrowboat"]
    assert cell["must_read_bytes"] == {
        "checked": 3 * GB // 2,
        "strictest": 14 * GB // 10,
        "all weights": 16 * GB // 10,
    }
    assert row["of_bound"]["checked"] == pytest.approx((1.5 / 1.8 / 1.0 + 1.5 / 1.8 / 0.9) / 2)
    assert row["of_bound"]["strictest"] < row["of_bound"]["checked"] < row["of_bound"]["all weights"]
    assert row["bytes_read"] == 3 * GB // 2
    assert row["tables_by_row"] == ["model.embed_tokens"]
    assert cell["rows"]["resident"]["of_bound"]["checked"] is None


def test_a_neighbour_that_slows_the_direct_reads_does_not_lower_the_bound() -> None:
    slow = record("narrowboat", 1.0, bandwidths=[0.4 * GB, 0.5 * GB])
    assert storage(slow) == pytest.approx(1.5 * GB), "the child was served faster than that"
    assert storage(record("narrowboat", 1.0)) == pytest.approx(1.8 * GB)
    assert storage(record("mmap", 1.0)) is None


def test_gains_are_medians_of_ratios_within_a_round() -> None:
    cell = derive_decoder(
        result(
            record("narrowboat", 1.0),
            record("accelerate_disk", 2.0),
            record("narrowboat", 10.0, 1),
            record("accelerate_disk", 40.0, 1),
        )
    )
    assert cell["rows"]["accelerate_disk"]["gain"] == pytest.approx(3.0)


def test_tokens_are_compared_as_far_as_a_stopped_subject_came() -> None:
    stopped = record("mmap", 2.0, ids=[7, 8], status="timeout", detail="stopped after 20 s")
    other = record("airllm", 2.0, ids=[7, 9, 9, 9])
    cell = derive_decoder(result(record("resident", 0.3), record("narrowboat", 1.0), stopped, other))
    assert cell["rows"]["mmap"]["same"] is True and not cell["rows"]["mmap"]["complete"]
    assert cell["rows"]["airllm"]["same"] is False
    assert cell["rows"]["narrowboat"]["complete"]


def verdicts(found: list[dict[str, Any]]) -> dict[str, bool]:
    return {v["what"]: v["passed"] for v in found}


def test_every_line_is_met_by_a_run_that_meets_it() -> None:
    good = result(
        record("resident", 0.3),
        record("narrowboat", 0.85),
        record("accelerate_disk", 1.7),
        record("accelerate_index", 1.6),
        record("accelerate_placed", None, status="oom", ids=[]),
        record("airllm", None, status="oom", ids=[]),
    )
    found = check_decoder(derive_decoder(good))
    assert all(v["passed"] for v in found), found
    told = next(v["numbers"] for v in found if "accelerate" in v["what"])
    assert "accelerate_index" in told and "accelerate_placed oom" in told


def test_a_run_that_falls_short_fails_line_by_line() -> None:
    bad = result(
        record("resident", 0.3),
        record("narrowboat", 1.0, ids=[7, 8, 9, 11], peak_bytes=GB),
        record("accelerate_disk", 1.7),
        record("airllm", None, status="error", detail="ValueError: no", ids=[]),
    )
    found = verdicts(check_decoder(derive_decoder(bad)))
    assert len(found) == 5 and not any(found.values()), found


def test_tables_are_made_of_any_status() -> None:
    cell = derive_decoder(
        result(
            record("resident", 0.3),
            record("narrowboat", 1.0),
            record("narrowboat_unpacked", None, status="error", detail="BudgetError: x", ids=[], stats={}),
            record("mmap", None, status="oom", detail="killed", ids=[]),
            record("transformers", 3.0, status="timeout", detail="stopped", ids=[7]),
        )
    )
    lines = {row[0]: row for row in decoder_rows(cell)}
    assert lines["mmap, safetensors"][1] == "killed"
    assert lines["plain transformers, limited"][1] == "0.333 (stopped)"
    assert any("window" in line for line in decoder_facts(cell))


def run(way: str, seconds: float, **changes: Any) -> dict[str, Any]:
    return {
        "way": way,
        "seconds": seconds,
        "bytes_read": 10 * GB,
        "group": 16,
        "alone": 0,
        "sweep_ms": [100.0, 110.0, 120.0] if way == "map" else [],
        "predicted_sweep_ms": 105.0,
        "peak_over_budget": -5,
        "pass_read_ms": [400.0] * 4,
        "pass_compute_ms": [50.0] * 4,
        "digest": "d",
        **changes,
    }


def test_a_map_is_asked_for_a_gain_only_where_reading_allows_it() -> None:
    fast = derive_map([run("single", 30.0), run("map", 5.0)])
    assert fast["ratio"] == 6 and fast["read_over_compute"] == 8 and fast["sweep_s"] == pytest.approx(0.11)
    assert all(verdicts(check_map("mlp", 64, fast)).values()) and len(check_map("mlp", 64, fast)) == 2
    slow = derive_map([run("single", 9.0), run("map", 5.0)])
    assert not all(verdicts(check_map("mlp", 64, slow)).values())
    computing = derive_map([run("single", 9.0, pass_compute_ms=[300.0] * 4), run("map", 5.0)])
    assert len(check_map("llama_1b", 64, computing)) == 1
    wrong = derive_map([run("single", 30.0), run("map", 5.0, digest="e")])
    assert not verdicts(check_map("mlp", 64, wrong))["the same bits as single passes"]
    shown = {"model": "mlp", "divisor": 4, "budget": GB, "inputs": 64, "cell": fast}
    assert map_rows([shown])[0][4] == "6.00"


def test_a_single_pass_is_held_against_its_bound() -> None:
    row = {"bound_ratio": 1.09, "own_bound_ratio": 1.0, "status": "ok", "detail": "", "exact": True, "difference": 0.0}
    row["plan_bound_s"] = 0.54
    cell = {"rows": {"narrowboat": row}, "resident_s": 0.3, "must_read_s": 0.5}
    assert all(verdicts(check_single(cell, "vgg19")).values())
    row["bound_ratio"] = 1.11
    assert not all(verdicts(check_single(cell, "vgg19")).values())
    row.update(bound_ratio=None, status="error", detail="BudgetError: x")
    assert not all(verdicts(check_single(cell, "vgg19")).values())


def test_the_clock_tells_of_each_token_and_changes_nothing() -> None:
    told: list[dict[str, Any]] = []
    clock = Clock(lambda kind, **values: told.append(values), 0.0, 3, 1e9, 0)
    given = prompt_ids(100, 3)
    assert torch.equal(given, prompt_ids(100, 3)) and given.shape == (1, 3)
    scores = torch.randn(1, 100)
    assert torch.equal(clock(given, scores), scores)
    assert torch.equal(clock(torch.cat([given, torch.tensor([[42]])], dim=1), scores), scores)
    assert [t["before"] for t in told] == [None, 42]
    assert told[0]["seconds"] <= told[1]["seconds"]
    assert not clock.over(given, scores).any()
    hurried = Clock(lambda kind, **values: None, 0.0, 3, -1.0, 0)
    assert not hurried.over(given, scores).any(), "the first token is always made"
    hurried(given, scores)
    assert hurried.over(given, scores).all()
