"""``--device`` and ``--host-budget``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

MODEL = "narrowboat.zoo:mobilenet_v2"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from narrowboat.zoo.save import save_random_weights

    path = tmp_path_factory.mktemp("weights") / "mobilenet.safetensors"
    save_random_weights("mobilenet_v2", path)
    return path


def test_a_run_on_a_device_tells_both_memories(narrowboat: Any, weights: Path) -> None:
    given = ("--budget", "40MiB", "--device", "emulated:256MiB:2GB", "--host-budget", "20MiB", "--verify", "--json")
    told = narrowboat("run", MODEL, "--weights", weights, *given).json()
    assert told["device"] == "emulated"
    assert told["bit_identical"] is True
    assert 0 < told["peak_bytes"] <= 40 << 20
    assert 0 < told["pinned_bytes"] <= 20 << 20
    assert told["copy_bytes_per_s"] > 0


def test_a_run_on_a_device_is_told_in_words(narrowboat: Any, weights: Path) -> None:
    given = ("--budget", "40MiB", "--device", "emulated:256MiB")
    finished = narrowboat("run", MODEL, "--weights", weights, *given, "--passes", "3")
    assert finished.code == 0, finished.err
    assert "of emulated, of 40.0 MiB" in finished.out
    assert "pinned" in finished.out
    assert "allocator  " not in finished.out


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (["--device", "emulated:256MiB"], 2, "give --budget"),
        (["--host-budget", "20MiB", "--budget", "40MiB"], 2, "--host-budget goes with --device"),
        (["--device", "toaster", "--budget", "40MiB"], 2, "toaster"),
        (["--device", "emulated", "--budget", "40MiB"], 2, "emulated:CAPACITY"),
        (["--device", "emulated:2 apples", "--budget", "40MiB"], 2, "apples"),
        (["--device", "emulated:10MiB", "--budget", "40MiB"], 1, "has free"),
        (["--device", "emulated:256MiB", "--budget", "40MiB", "--host-budget", "1KiB"], 1, "budget for cpu|1.00 KiB"),
        (["--device", "emulated:256MiB", "--budget", "1MiB"], 1, "smallest that can"),
    ],
)
def test_what_cannot_be_is_one_line(narrowboat: Any, weights: Path, given: list[str], code: int, says: str) -> None:
    finished = narrowboat("run", MODEL, "--weights", weights, *given)
    assert finished.code == code, finished.err
    assert any(part in finished.err for part in says.split("|")), finished.err
    assert "Traceback" not in finished.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line_with_the_reason(narrowboat: Any, weights: Path) -> None:
    finished = narrowboat("run", MODEL, "--weights", weights, "--device", "cuda", "--budget", "40MiB")
    assert finished.code == 1
    assert "device 'cuda' cannot be used" in finished.err
