"""Plans, predicted and measured: the curve of budgets, the schemes, one idea taken away at a time, live changes.

    python benchmarks/plan.py                               # everything, about half an hour on two quiet cores
    python benchmarks/plan.py --models resnet101 --parts curve,schemes
    python benchmarks/plan.py --parts live

Every run is a child process; children take turns, round by round, and each round is framed by plain PyTorch with
everything in memory, so that the drift of a shared machine can be told from an error of the prediction. The profile
is made once per model, as ``narrowboat profile`` does. Writes ``plan.json`` and ``plan.md``.
"""

from __future__ import annotations

import os

# Before torch is imported, or libgomp does not see it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import gc
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from torch._subclasses import fake_tensor  # noqa: F401 - imported once here instead of in every child

from inference_kit.arguments import make_folders, names
from inference_kit.campaign import Limits
from inference_kit.report import machine_facts
from narrowboat.errors import NarrowboatError
from narrowboat.zoo import MODELS as ZOO
from plan_kit.campaign import MODELS, Campaign, live_changes
from plan_kit.report import print_results, write_markdown
from plan_kit.verdicts import cells, verdicts

_PARTS = ("curve", "schemes", "ablations", "live")
_LIVE = "efficientnet_lite2"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(_PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds (default: by model)")
    parser.add_argument("--passes", type=int, help="passes of every child (default: by model)")
    parser.add_argument("--live-passes", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--live-changes", type=int, default=100, help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="folder for weights files")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for the results")
    parser.add_argument("--again", type=Path, help="derive the results anew from a plan.json, measuring nothing")
    arguments = parser.parse_args()
    arguments.models = names(parser, arguments.models, MODELS, "model")
    arguments.parts = names(parser, arguments.parts, _PARTS, "part")
    return arguments


def main() -> int:
    """Run the benchmark; 0 if it ran, whatever it showed."""
    arguments = _arguments()
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    began = time.perf_counter()
    make_folders(arguments)
    for name in (*arguments.models, _LIVE):
        with torch.device("meta"):
            ZOO[name]()
    gc.collect()
    gc.freeze()
    if arguments.again is not None:
        record = json.loads(arguments.again.read_text(encoding="utf-8"))
        results, live, facts, failed = record["models"], record["live"], record["machine"], ""
    else:
        results, live, failed = [], None, ""
        try:
            for name in arguments.models if set(arguments.parts) - {"live"} else ():
                model = MODELS[name]
                model.rounds = arguments.rounds or model.rounds
                model.passes = arguments.passes or model.passes
                parts = {part: part in arguments.parts for part in ("curve", "schemes", "ablations")}
                results.append(Campaign(model, arguments.work, lambda t: print(t, flush=True), **parts).run())
            if "live" in arguments.parts:
                live = live_changes(_LIVE, arguments.work, arguments.live_passes, arguments.live_changes)
        except NarrowboatError as error:  # what was measured until then is kept
            failed = str(error)
            console.print(f"[red]{failed}[/]")
        facts = machine_facts(Limits(0, 0, 0, "none"), [], time.perf_counter() - began)
    found = [cell for result in results for cell in cells(result)]
    judged = verdicts(found, live)
    record = {"machine": facts, "cells": found, "checks": judged, "live": live, "models": results}
    (arguments.out / "plan.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_markdown(arguments.out / "plan.md", facts, found, judged, live)
    print_results(console, found, judged)
    console.print(f"{facts['wall_seconds']:.0f} s; wrote {arguments.out}/plan.json and plan.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
