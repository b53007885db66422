"""``narrowboat run``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

MODEL = "tiny_model:factory"
WEIGHTS = ("--weights", "tiny.safetensors")
KEYS = {
    "latency_ms", "predicted_latency_ms", "stall_ms", "bytes_read", "budget_bytes", "min_budget_bytes", "peak_bytes",
    "bit_identical", "direct_io", "model", "weights", "first_answer_ms", "resident_bytes", "window_bytes",
    "allocator_policy", "copied_bytes",
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_a_run_in_less_than_the_weights_is_plain_pytorch_bit_by_bit(narrowboat: Any, tiny: Path, packed: bool) -> None:
    if packed:
        assert narrowboat("pack", "tiny.safetensors", "-o", "packed.safetensors", "--model", MODEL).code == 0
    weights = ("--weights", "packed.safetensors" if packed else "tiny.safetensors")
    finished = narrowboat("run", MODEL, *weights, "--budget", "11MiB", "--passes", 3, "--verify", "--json")
    assert finished.code == 0, finished.err
    report = finished.json()
    assert report.keys() >= KEYS
    assert report["bit_identical"] is True
    assert [len(report[key]) for key in ("latency_ms", "stall_ms", "bytes_read")] == [3, 3, 3]
    assert report["budget_bytes"] == 11 << 20
    assert report["min_budget_bytes"] <= 11 << 20 < report["weight_bytes"] + (8 << 20)
    assert all(nbytes > 0 for nbytes in report["bytes_read"])
    assert (report["copied_bytes"] > 0) is not packed


def test_without_verify_nothing_is_claimed(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("run", MODEL, *WEIGHTS, "--budget", "100MiB", "--passes", 1, "--json")
    assert finished.json()["bit_identical"] is None


def test_a_different_bit_is_exit_1_and_a_clear_line(
    narrowboat: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narrowboat.report import run

    real = run.load_weights

    def flip_one_bit(module: torch.nn.Module, index: Any) -> None:
        real(module, index)
        with torch.no_grad():
            module.layers[3].bias.view(torch.int32)[0] ^= 1 << 16

    monkeypatch.setattr(run, "load_weights", flip_one_bit)
    finished = narrowboat("run", MODEL, *WEIGHTS, "--budget", "100MiB", "--passes", 2, "--verify", "--json")
    assert finished.code == 1
    assert finished.json()["bit_identical"] is False
    assert "error: the output is not plain PyTorch's: " in finished.err
    assert "differ" in finished.err


def test_a_torch_file_is_verified_too(narrowboat: Any, tiny: Path) -> None:
    torch.save(load_file("tiny.safetensors"), "tiny.pth")
    finished = narrowboat(
        "run", MODEL, "--weights", "tiny.pth", "--budget", "100MiB", "--passes", 1, "--verify", "--json"
    )
    assert finished.code == 0, finished.err
    assert finished.json()["bit_identical"] is True


def test_a_budget_that_is_too_small_is_refused_with_the_smallest_that_is_not(narrowboat: Any, tiny: Path) -> None:
    refused = narrowboat("run", MODEL, *WEIGHTS, "--budget", "1KiB", "--json")
    assert refused.code == 1
    error = refused.json()["error"]
    assert error["type"] == "BudgetError"
    finished = narrowboat("run", MODEL, *WEIGHTS, "--budget", error["minimum"], "--passes", 2, "--verify", "--json")
    assert finished.code == 0, finished.err
    assert finished.json()["bit_identical"] is True


@pytest.mark.parametrize(
    "arguments",
    [
        ("--budget", "12 apples"),
        ("--budget", "100MiB", "--passes", "0"),
        ("--budget", "100MiB", "--io", "telepathy"),
        ("--budget", "100MiB", "--output", "out.txt"),
        ("--budget", "100MiB", "--trace", "no/such/folder/trace.json"),
        ("--budget", "100MiB", "--input", "missing.npy"),
    ],
)
def test_wrong_usage_is_exit_2_before_anything_runs(narrowboat: Any, tiny: Path, arguments: tuple[str, ...]) -> None:
    assert narrowboat("run", MODEL, *WEIGHTS, *arguments).code == 2


def test_a_model_without_weights_or_inputs_says_which_option_is_missing(narrowboat: Any, tiny: Path) -> None:
    assert "give --weights FILE" in narrowboat("run", MODEL, "--budget", "100MiB").err
    assert "give --input FILE" in narrowboat("run", "tiny_model:without_example", *WEIGHTS, "--budget", "1GiB").err


def test_the_table_says_what_a_person_wants_to_know(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("run", MODEL, *WEIGHTS, "--budget", "100MiB", "--passes", 2, "--verify")
    assert finished.code == 0, finished.err
    for words in ("first answer", "peak memory", "100 MiB", "every bit"):
        assert words in finished.out


def test_output_trace_and_timeline_are_written(narrowboat: Any, tiny: Path) -> None:
    numpy.save("in.npy", numpy.full((3, 512), 0.5, dtype=numpy.float32))
    torch.manual_seed(2)
    from safetensors.torch import save_file

    layer = torch.nn.Linear(512, 512)
    save_file(layer.state_dict(), "single.safetensors")
    finished = narrowboat(
        "run", "tiny_model:single", "--weights", "single.safetensors", "--budget", "100MiB", "--passes", 2,
        "--input", "in.npy", "--output", "out.npy", "--trace", "trace.json", "--timeline", "timeline.png",
    )  # fmt: skip
    assert finished.code == 0, finished.err
    with torch.inference_mode():
        assert numpy.array_equal(numpy.load("out.npy"), layer(torch.full((3, 512), 0.5)).numpy())
    assert json.loads(Path("trace.json").read_text())["traceEvents"]
    assert Path("timeline.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_budget_it_is_resolved_from_the_machine_and_said(narrowboat: Any, tiny: Path) -> None:
    finished = narrowboat("run", MODEL, *WEIGHTS, "--passes", 1, "--json")
    assert finished.code == 0, finished.err
    assert finished.err.startswith("budget: ")
    assert finished.json()["budget_bytes"] > 100 << 20
