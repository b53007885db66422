"""``benchmarks/map.py`` from here: many inputs per sweep against single passes, on models that wait for storage."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from inference_kit.children import Emit, run_child
from narrowboat.errors import NarrowboatError

_SCRIPT = Path(__file__).resolve().parents[1] / "map.py"


@dataclass(frozen=True, slots=True)
class MapRun:
    """One model to map.

    Attributes:
        model: of ``map_models`` or the zoo.
        divisor: the budget is the weights by this.
        inputs: how many.
        rounds: times that both ways run, in turn.
    """

    model: str
    divisor: float
    inputs: int
    rounds: int


def run_map(run: MapRun, work: Path, weights: Path | None = None) -> dict[str, Any]:
    """What ``map.py`` prints, as a dict; ``weights``: a packed file of the model, made here if it is not given.

    Raises:
        NarrowboatError: it failed, or the two ways gave different bits.
    """
    path = weights or work / f"{run.model}.map.safetensors"
    if not path.exists():
        made = run_child(partial(_prepare, run.model, work), log=work / "logs" / "map.prepare.jsonl", timeout=600)
        if made.status != "ok":
            raise NarrowboatError(f"cannot make the weights of {run.model}: {made.detail}")
    command = [sys.executable, str(_SCRIPT), "--model", run.model, "--weights", str(path)]
    command += ["--divisor", str(run.divisor), "--inputs", str(run.inputs), "--rounds", str(run.rounds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        raise NarrowboatError(f"map.py failed on {run.model}: {done.stderr[-400:]}")
    told: dict[str, Any] = json.loads(done.stdout)
    told["divisor"] = run.divisor
    return told


def _prepare(name: str, work: Path, emit: Emit) -> None:
    sys.path.insert(0, str(_SCRIPT.parent))
    from map import prepared

    prepared(name, work)
