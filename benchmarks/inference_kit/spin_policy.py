"""What PyTorch's default OpenMP waiting costs as soon as one other process is busy.

Run as a script it is the measured child: passes of plain resnet101, seconds of each as a JSON list.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_POLICIES = {"PyTorch's default": None, "GOMP_SPINCOUNT=1000": "1000"}
_MODEL = "resnet101"
_SECONDS = 4.0
_ROUNDS = 2


def spin_policy_runs(work: Path) -> list[dict[str, Any]]:
    """Both policies, alone and beside one busy process, in turn; median milliseconds per pass."""
    from narrowboat.machine.busy import busy_processes

    times: dict[tuple[str, int], list[float]] = {}
    for _ in range(_ROUNDS):
        for busy in (0, 1):
            for policy, count in _POLICIES.items():
                env = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
                if count is not None:
                    env["GOMP_SPINCOUNT"] = count
                with busy_processes(busy):
                    command = [sys.executable, __file__, str(work / f"{_MODEL}.safetensors")]
                    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
                times.setdefault((policy, busy), []).append(statistics.median(json.loads(done.stdout)))
    return [
        {"policy": policy, "busy_processes": busy, "median_ms": statistics.median(found) * 1e3}
        for (policy, busy), found in times.items()
    ]


def _measure(path: str) -> list[float]:
    import torch
    from safetensors.torch import load_file

    from narrowboat.zoo import MODELS

    module = MODELS[_MODEL]()
    if Path(path).exists():
        module.load_state_dict(load_file(path))
    inputs = MODELS[_MODEL].example_inputs()
    seconds: list[float] = []
    with torch.inference_mode():
        module(*inputs)
        began = time.perf_counter()
        while len(seconds) < 3 or time.perf_counter() - began < _SECONDS:
            start = time.perf_counter()
            module(*inputs)
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1])))
