"""The tasks of a description as plain PyTorch: a thread each, weights mapped from their files, nobody in charge.

    python benchmarks/tasks_kit/plain_child.py TASKS.yaml SECONDS

Says ``ready`` once PyTorch is loaded and warm; goes on when told to, so that a memory limit can be put around it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from narrowboat.machine.memory import process_memory
from narrowboat.profile.warmup import warm_up
from narrowboat.tasks.execute.load_models import spec_name
from narrowboat.tasks.spec.load import load_tasks
from narrowboat.tasks.spec.schema import TaskSpec
from narrowboat.zoo.request import find_request


def main() -> None:
    """Run, and print one JSON document."""
    path, seconds = Path(sys.argv[1]), float(sys.argv[2])
    settings = load_tasks(path)
    torch.set_num_threads(1)
    warm_up()
    baseline = process_memory().rss
    print("ready", flush=True)
    sys.stdin.readline()
    models = {}
    for task in settings.tasks:
        assert task.model is not None and task.weights is not None
        weights = path.parent / task.weights
        request = find_request(spec_name(task.model), weights)
        with torch.device("meta"):
            module = request.factory()
        state = {name: tensor for name, tensor in load_file(str(weights)).items() if "narrowboat" not in name}
        module.load_state_dict(state, assign=True, strict=False)
        for name, buffer in module.named_buffers():
            assert not buffer.is_meta, name
        models[task.name] = (module.eval(), request.need_inputs())
    told: dict[str, list[list[int]]] = {task.name: [] for task in settings.tasks}
    start = time.monotonic() + 0.5
    threads = [
        threading.Thread(target=_run, args=(task, *models[task.name], start, seconds, told[task.name]), daemon=True)
        for task in settings.tasks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(start + seconds + 60 - time.monotonic())
    print(json.dumps({"jobs": told, "peak_bytes": process_memory().hwm - baseline}), flush=True)


def _run(
    task: TaskSpec, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], start: float, seconds: float, told: list
) -> None:
    """One job per period; one whose deadline has passed before it could begin is given up, as narrowboat does."""
    number = 0
    with torch.inference_mode():
        while (at := task.step * number / 1e6) < seconds:
            number += 1
            release, due = start + at, start + at + task.relative_deadline / 1e6
            time.sleep(max(release - time.monotonic(), 0))
            if time.monotonic() >= due:
                told.append([round(at * 1e6), -1])
                continue
            module(*inputs)
            told.append([round(at * 1e6), round((time.monotonic() - release) * 1e6)])


if __name__ == "__main__":
    main()
