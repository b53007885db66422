"""What belongs to the process and not to a model is there before the baseline is taken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# The first pass of a model without a trace meets its stand-ins with an operator.
CHILD = """
import sys, torch
import narrowboat as nb
from narrowboat.machine.memory import process_memory
torch.set_num_threads(1)
model = nb.stream(lambda: torch.nn.Linear(1024, 1024).eval(), sys.argv[1], budget="5600KiB")
with torch.inference_mode():
    for _ in range(3):
        model(torch.ones(4, 1024))
print(nb.session(model).peak_bytes)
"""


def test_without_an_example_the_first_pass_loads_nothing_of_pytorchs(tmp_path: Path) -> None:
    save_file(dict(torch.nn.Linear(1024, 1024).state_dict()), tmp_path / "w.safetensors")
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "w.safetensors")], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) < 12 << 20, run.stderr
