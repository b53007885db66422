"""The subjects: one model run four ways, measured alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from narrowboat.checkpoint import pack
from narrowboat.demo.subjects import SUBJECTS, main, measure
from narrowboat.errors import UsageError
from narrowboat.zoo.model import IMAGENET_MEAN, IMAGENET_STD
from narrowboat.zoo.request import Request
from narrowboat.zoo.resolve import ResolvedModel

KEYS = {
    "subject", "model", "weights", "budget_bytes", "first_answer_ms", "latency_ms", "bytes_read", "baseline_bytes",
    "peak_bytes", "output_digest", "stopped", "details",
}  # fmt: skip


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 64)).eval()


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    torch.manual_seed(3)
    pack(_model().state_dict(), tmp_path / "w.safetensors")
    inputs = (torch.randn(1, 3, 8, 8),)
    resolved = ResolvedModel("tests:model", _model, inputs, IMAGENET_MEAN, IMAGENET_STD)
    return Request(resolved, _model, tmp_path / "w.safetensors", inputs)


def test_every_subject_gives_plain_pytorchs_bits_and_the_same_keys(
    request_: Request, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate")
    results = {name: measure(name, request_, budget=64 << 20, passes=3) for name in SUBJECTS}
    assert all(result.keys() == KEYS for result in results.values())
    assert all(len(result["latency_ms"]) == len(result["bytes_read"]) == 3 for result in results.values())
    assert len({result["output_digest"] for result in results.values()}) == 1
    assert results["narrowboat"]["details"]["min_budget_bytes"] > 0
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [event["event"] for event in events[:4]] == ["ready", "pass", "pass", "pass"]


def test_the_time_limit_ends_it_after_the_pass_under_way(request_: Request) -> None:
    result = measure("plain", request_, budget=None, passes=1000, seconds=0.0)
    assert result["stopped"] is True
    assert len(result["latency_ms"]) == 1


def test_a_trace_of_the_last_passes_is_written_when_asked(request_: Request, tmp_path: Path) -> None:
    measure("narrowboat", request_, budget=64 << 20, passes=2, trace=tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_narrowboat_needs_a_budget(request_: Request) -> None:
    with pytest.raises(UsageError, match="--budget"):
        measure("narrowboat", request_, budget=None, passes=1)


def test_an_error_is_an_event_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plain", "--model", "no.such.module:factory", "--weights", "nowhere.safetensors"]) == 2
    event = json.loads(capsys.readouterr().err)
    assert (event["event"], event["type"]) == ("error", "UsageError")
