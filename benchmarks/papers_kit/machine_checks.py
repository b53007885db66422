"""What the machine is and lacks; and the executor as a process of its own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import narrowboat as nb
from papers_kit import nets
from papers_kit.check import Bench, Measurement
from papers_kit.device_checks import _saved
from papers_kit.energy import energy_joules

_JOBS = 4


def lacks(bench: Bench) -> Measurement:
    """What some claims would need."""
    return {
        "gpu": torch.cuda.is_available(),
        "energy": energy_joules() is not None,
        "phone": hasattr(os, "getandroidapilevel") or Path("/system/build.prop").exists(),
        "darknet": importlib.util.find_spec("narrowboat.integrations.darknet") is not None,
        "torch": torch.__version__,
    }


def processes(bench: Bench) -> Measurement:
    """Jobs submitted from this process and run in another."""
    return bench.apart("processes", lambda emit: emit("measured", **_submit(bench.work)), 120)


def _submit(work: Path) -> dict[str, Any]:
    path, x, wanted = _saved(nets.third, work / "third.safetensors")
    spec: dict[str, Any] = {"name": "third", "model": "papers_kit.nets:third", "weights": str(path)}
    spec |= {"contract": {"burst": _JOBS, "period": "1s"}, "guarantee": "best-effort", "input": {"queue": "third"}}
    told = {"budget": "64MiB", "calibration": "1s", "tasks": [spec]}
    kits = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (kits, os.environ.get("PYTHONPATH"))))
    with nb.TaskSet.from_dict(told).start() as run:
        child = _children(os.getpid())
        answers = []
        for _ in range(_JOBS):
            answers.append(run.submit("third", x).result(timeout=30))
        run.stop()
        run.wait()
    done = [torch.equal(tree_leaves(answer.output)[0], wanted) for answer in answers]
    return {
        "jobs": len(done),
        "apart": bool(child),
        "job_done": all(done),
        "left_cleanly": not any(Path(f"/proc/{pid}").exists() for pid in child),
    }


def _children(pid: int) -> list[int]:
    """Processes whose parent this is."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found
