"""A child that is too slow, or fails, still leaves what it measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from narrowboat.demo.child import Outcome, Task, run_child, why_unlimited

MODEL = """
import time
import torch

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            time.sleep(60)
        return self.linear(x)

class Broken(Slow):
    def forward(self, x):
        raise RuntimeError("no answer")

def slow():
    return Slow()

def broken():
    return Broken()

slow.example_inputs = broken.example_inputs = lambda: (torch.ones(1, 4),)
"""


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "slow_model.py").write_text(MODEL)
    save_file(torch.nn.Linear(4, 4).state_dict(prefix="linear."), tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "w.safetensors"


def test_a_pass_that_outlasts_the_time_limit_is_cut_off_and_its_length_known_as_a_bound(weights: Path) -> None:
    seen: list[int] = []
    task = Task("plain", "slow_model:slow", weights, passes=3, limit=256 << 20, seconds=0.5)
    outcome = run_child(task, on_pass=lambda number, latency: seen.append(number))
    assert outcome.killed
    assert seen == [1]
    assert len(outcome.latency_ms) == 1
    assert outcome.unfinished_ms is not None and outcome.unfinished_ms > 500
    assert len(outcome.digests) == 1 and outcome.failure == ""
    assert outcome.peak_bytes is not None
    assert outcome.limited is (why_unlimited() is None)


def test_a_child_that_fails_says_why(weights: Path) -> None:
    outcome = run_child(Task("plain", "slow_model:broken", weights))
    assert "no answer" in outcome.failure
    assert outcome.steady_ms is None and outcome.unfinished_ms is None


def test_the_steady_median_leaves_out_the_first_passes() -> None:
    task = Task("plain", "m:f", Path("w"))
    assert Outcome(task, latency_ms=[9.0]).steady_ms == 9.0
    assert Outcome(task, latency_ms=[9.0, 2.0, 4.0]).steady_ms == 3.0
    assert Outcome(task, latency_ms=[9.0, 8.0, 1.0, 3.0], bytes_read=[9, 8, None, 4]).steady_ms == 2.0
    assert Outcome(task, latency_ms=[9.0, 8.0, 1.0, 3.0], bytes_read=[9, 8, None, 4]).steady_read == 4
