"""Task sets: how many are admitted, whether bounds hold, how quick admission is, and what overload does.

    python benchmarks/tasks.py --out docs/benchmarks

Random sets with printed seeds (UUniFast; periods log-uniform over a decade, deadlines their periods), as is usual in
the literature on schedulability; times are whole microseconds. The parts ``robot`` and ``applications`` are run
for real, on an otherwise idle machine, with the weights that ``python examples/robot/weights.py`` writes. What a run
leaves out stays in tasks.json as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tasks_kit.admitted import METHODS, admitted_share
from tasks_kit.real import applications, robot
from tasks_kit.report import draw, write_markdown
from tasks_kit.sets import Shape
from tasks_kit.soundness import admission_times, soundness

SEED = 20261122
PARTS = ("sets", "robot", "applications")
CURVES = {
    "utilisation": [Shape(utilisation=u) for u in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)],
    "demand over capacity": [Shape(demand=d) for d in (1.0, 1.25, 1.5, 1.96, 2.5, 3.0)],
    "load over compute": [Shape(load=r) for r in (0.1, 0.3, 0.5, 0.8, 1.2, 1.6)],
}


def main() -> None:
    """Run the parts and write tasks.json, tasks.md and tasks.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=500, help="random sets per point")
    parser.add_argument("--jobs", type=int, default=100_000, help="simulated jobs of admitted sets")
    parser.add_argument(
        "--parts", nargs="*", default=PARTS, choices=PARTS, help="what to measure; none: draw anew what is there"
    )
    parser.add_argument("--seconds", type=float, default=600, help="of the robot")
    parser.add_argument("--beside", type=float, default=240, help="seconds of the same without narrowboat")
    parser.add_argument("--application-seconds", type=float, default=60, help="of each application and budget")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    kept = arguments.out / "tasks.json"
    told = json.loads(kept.read_text()) if kept.exists() else {}
    if "sets" in arguments.parts:
        told |= _sets(arguments.sets, arguments.jobs)
    machine = {"commit": _commit(), "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
    if "robot" in arguments.parts:
        told["robot"] = {**machine, **robot(arguments.seconds, arguments.beside, _say)}
    if "applications" in arguments.parts:
        told["applications"] = {**machine, **applications(arguments.application_seconds, _say)}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tasks.json").write_text(json.dumps(told, indent=1) + "\n")
    write_markdown(told, arguments.out / "tasks.md")
    draw(told, arguments.out / "tasks.png")
    print((arguments.out / "tasks.md").read_text())


def _sets(count: int, jobs: int) -> dict[str, Any]:
    """Random sets, in simulated time."""
    start = time.perf_counter()
    curves = {
        name: {
            "x": [getattr(shape, shape.varied(name)) for shape in shapes],
            "share": {method: [admitted_share(shape, method, count, SEED) for shape in shapes] for method in METHODS},
        }
        for name, shapes in CURVES.items()
    }
    return {
        "seed": SEED,
        "sets": count,
        "shape": vars(Shape()),
        "curves": curves,
        "soundness": soundness(jobs, SEED),
        "admission": admission_times(SEED),
        "seconds": round(time.perf_counter() - start),
    }


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def _say(said: str) -> None:
    print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
