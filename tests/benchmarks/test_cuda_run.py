"""``benchmarks/gpu.py`` from end to end on an emulated device: small models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
DEVICE = "emulated:256MiB:1GB"


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", DEVICE, "--small", "--work", str(folder / "work")]
    command += ["--out", str(folder / "cuda.json"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    done = start(folder, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "cuda.json").read_text())
    return found


def test_a_small_run_measures_all_of_it(tmp_path: Path) -> None:
    data = run(tmp_path, "--only", "vit,swap,training")
    records = data["records"]
    lacking = {key: r["detail"] for key, r in records.items() if r["status"] not in ("ok", "not installed")}
    assert not lacking
    for kind in ("host", "storage", "unified"):
        cells = [cell for cell in data["derived"]["cells"] if cell["kind"] == kind]
        assert cells and all(cell["exact"] and cell["seconds"] for cell in cells), kind
    streamed = [cell for cell in data["derived"]["cells"] if cell["kind"] == "host"]
    assert {cell["divisor"] for cell in streamed} == {2.32, 5.81}
    assert all(cell["copied_bytes"] >= 0.9 * cell["must_copy_bytes"] > 0 for cell in streamed)
    assert all(cell["own_peak_bytes"] <= cell["budget_bytes"] for cell in streamed)
    assert {"accelerate", "diffusers_block", "diffusers_leaf"} <= set(streamed[0]["peers"])
    assert all(chunk["free_exact"] and chunk["bytes_same"] for chunk in records["swap"]["chunks"])
    trained = records["training/narrowboat@50%"]
    assert trained["measured_peak_bytes"] <= trained["budget_bytes"]
    assert not [each for each in data["checks"] if each["pass"] is False]
    page = (tmp_path / "cuda.md").read_text()
    assert all(words in page for words in ("## Inference: vit", "## A task swapped", "## Training"))
