"""Several nodes on this machine: tasks placed on them, one model over them, a data set through them.

    python benchmarks/cluster.py                      # all sections, into docs/benchmarks/cluster.{json,md}
    python benchmarks/cluster.py --only tasks --quick

Needs narrowboat[ray]. Each cluster lives in a child process, so that none sees what another has left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from narrowboat.machine.openmp import apply_openmp_policy
from nodes_kit.page import markdown


def tasks(folder: Path, quick: bool) -> dict[str, Any]:
    """Requests per second on 1, 2, 3 nodes, interleaved; a node killed."""
    rounds = 1 if quick else 3
    seen: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 3: []}
    for _ in range(rounds):
        for nodes, runs in seen.items():
            runs.append(_child("throughput", folder, nodes, 5.0 if quick else 15.0))
    shown = [{key: median(run[key] for run in runs) for key in runs[0]} for runs in seen.values()]
    for nodes, run in zip(seen, shown, strict=True):
        pairs = zip(seen[nodes], seen[1], strict=True)
        run["ratio"] = median(many["requests_per_second"] / one["requests_per_second"] for many, one in pairs)
    return {"rounds": rounds, "throughput": shown, "kill": _child("kill", folder)}


def pipeline(folder: Path, quick: bool) -> dict[str, Any]:
    """A ViT over 1, 2, 3 nodes, each too small for it."""
    return _child("pipeline", folder, quick)


def dataset(folder: Path, quick: bool) -> dict[str, Any]:
    """Rows through a ResNet-50 larger than each node's bytes."""
    return _child("dataset", folder, quick)


SECTIONS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "tasks": tasks,
    "pipeline": pipeline,
    "dataset": dataset,
}


def _child(what: str, folder: Path, *arguments: Any) -> dict[str, Any]:
    """One measurement in a process of its own."""
    told = folder / "told.json"
    command = [sys.executable, __file__, "--child", what, "--work", str(folder), "--arguments", json.dumps(arguments)]
    subprocess.run(command, check=True, timeout=1800, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def _measure(what: str, folder: Path, arguments: list[Any]) -> dict[str, Any]:
    if what in ("throughput", "kill"):
        from nodes_kit import tasks as kit

        measured: dict[str, Any] = getattr(kit, what)(folder, *arguments, _say)
        return measured
    from narrowboat.cluster.local import local_cluster

    [quick] = arguments
    if what == "pipeline":
        from nodes_kit.pipeline_subject import BUDGET, subject

        with local_cluster([(f"n{k}", BUDGET) for k in range(3)]) as cluster:
            return subject(folder, list(cluster.nodes), quick)
    from nodes_kit.dataset import measure

    with local_cluster([(f"n{k}", 1 << 30) for k in range(3)]) as cluster:
        return measure(folder, list(cluster.nodes), rows=300 if quick else 3000)


def main() -> None:
    """Measure the sections and write cluster.json and cluster.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda said: said.split(","), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: to see that it works")
    parser.add_argument("--work", type=Path, help="folder for weights; a temporary one if not")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", type=json.loads, default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    apply_openmp_policy()
    if given.child:
        found = _measure(given.child, given.work, given.arguments)
        (given.work / "told.json").write_text(json.dumps(found))
        return
    unknown = set(given.only or ()) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {min(unknown)!r}; there are {', '.join(SECTIONS)}")
    kept = given.out / "cluster.json"
    told: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory(prefix="narrowboat-cluster-") as temporary:
        if given.work is not None:
            given.work.mkdir(parents=True, exist_ok=True)
        given.out.mkdir(parents=True, exist_ok=True)
        for name in given.only or SECTIONS:
            began = time.monotonic()
            found = SECTIONS[name](given.work or Path(temporary), given.quick)
            told[name] = {
                "commit": _commit(),
                "date": time.strftime("%Y-%m-%d"),
                "cores": os.cpu_count(),
                "quick": given.quick,
                "took_seconds": round(time.monotonic() - began),
                **found,
            }
            kept.write_text(json.dumps(told, indent=1) + "\n")
    page = markdown(told)
    (given.out / "cluster.md").write_text(page)
    print(page)


def _commit() -> str:
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def _say(said: str) -> None:
    print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
