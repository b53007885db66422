"""Task sets: how many are admitted, whether bounds hold, how quick admission is, and what overload does.

    python benchmarks/tasks.py --out docs/benchmarks

Random sets with printed seeds (UUniFast; periods log-uniform over a decade, deadlines their periods), as is usual in
the literature on schedulability. Times are whole microseconds, and nothing here is run for real: that is
``narrowboat tasks run``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from tasks_kit.admitted import METHODS, admitted_share
from tasks_kit.report import draw, write_markdown
from tasks_kit.sets import Shape
from tasks_kit.soundness import admission_times, soundness

SEED = 20261122
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
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    arguments = parser.parse_args()
    start = time.perf_counter()
    curves = {
        name: {
            "x": [getattr(shape, shape.varied(name)) for shape in shapes],
            "share": {
                method: [admitted_share(shape, method, arguments.sets, SEED) for shape in shapes] for method in METHODS
            },
        }
        for name, shapes in CURVES.items()
    }
    told = {
        "seed": SEED,
        "sets": arguments.sets,
        "shape": vars(Shape()),
        "curves": curves,
        "soundness": soundness(arguments.jobs, SEED),
        "admission": admission_times(SEED),
        "seconds": round(time.perf_counter() - start),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tasks.json").write_text(json.dumps(told, indent=1) + "\n")
    write_markdown(told, arguments.out / "tasks.md")
    draw(told, arguments.out / "tasks.png")
    print((arguments.out / "tasks.md").read_text())


if __name__ == "__main__":
    main()
