"""Inference inside a byte budget, side by side: narrowboat, plain PyTorch, mmap, accelerate and diffusers.

Every subject runs in a child process of its own, interleaved in rounds, the limited ones in a memory cgroup of
(warm process without a model) + budget + slack, with the weights out of the page cache at the start and the same
OpenMP policy and threads. Writes ``inference.json``, ``inference.md`` and ``inference.png``.

    make bench                                   # everything, about twelve minutes on two cores
    make bench ARGS="--quick --models resnet101"
"""

from __future__ import annotations

import os

# Before torch is imported, or libgomp does not see it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import gc
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch._subclasses import fake_tensor  # noqa: F401 - imported once here instead of in every child

from inference_kit.arguments import make_folders, names, with_resident_first
from inference_kit.campaign import Campaign, measure_limits
from inference_kit.checks import check
from inference_kit.derive import derive
from inference_kit.effort import EFFORTS, effort
from inference_kit.report import machine_facts, print_checks, print_table, write_markdown, write_plot
from inference_kit.spin_policy import spin_policy_runs
from inference_kit.subjects import SUBJECTS
from narrowboat.errors import NarrowboatError
from narrowboat.zoo import MODELS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(EFFORTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--budgets", default="2.32,5.81,1", help="divisors of the weights (default: %(default)s)")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="comma-separated (default: all)")
    parser.add_argument("--rounds", type=int, help="rounds for every subject (default: by model)")
    parser.add_argument("--passes", type=int, help="passes of every child after the first (default: by model)")
    parser.add_argument("--quick", action="store_true", help="one round, few passes")
    parser.add_argument("--slack", type=int, default=64, help="MiB on top of the limit (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="folder for weights files")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for the results")
    parser.add_argument("--again", type=Path, help="derive the results anew from an inference.json, measuring nothing")
    parser.add_argument(
        "--default-openmp-busy",
        action="store_true",
        help="also plain resnet101 under PyTorch's default OpenMP policy, alone and beside a busy process",
    )
    arguments = parser.parse_args()
    arguments.models = names(parser, arguments.models, EFFORTS, "model")
    arguments.subjects = names(parser, arguments.subjects, SUBJECTS, "subject")
    arguments.subjects = with_resident_first(arguments.subjects, SUBJECTS)
    try:
        arguments.budgets = [float(text) for text in arguments.budgets.split(",")]
    except ValueError:
        parser.error(f"--budgets takes numbers, not {arguments.budgets!r}")
    if any(not b >= 0.1 for b in arguments.budgets):
        parser.error("--budgets are divisors of the weights, such as 2.32")
    if any(n is not None and n < 1 for n in (arguments.rounds, arguments.passes)):
        parser.error("--rounds and --passes must be at least 1")
    return arguments


def _import_for_children(models: list[str], subjects: list[str]) -> None:
    """Import now what children would import each: building on meta computes nothing, so no thread is started."""
    for name in models:
        with torch.device("meta"):
            MODELS[name]()
    if "diffusers" in subjects:
        from diffusers.hooks import apply_group_offloading  # noqa: F401
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    # Children collect garbage; what is here already need not be copied for that.
    gc.collect()
    gc.freeze()


def main() -> int:
    """Run the benchmark; 0 if it ran, whatever it showed."""
    arguments = _arguments()
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 150)
    began = time.perf_counter()
    make_folders(arguments)
    _import_for_children(arguments.models, arguments.subjects)
    if arguments.again is not None:
        record = json.loads(arguments.again.read_text(encoding="utf-8"))
        _write(arguments.out, record["models"], record["machine"], record["spin_policy"], console)
        return 0
    results = []
    try:
        limits = measure_limits(arguments.work, arguments.slack << 20)
        if limits.refusal:
            console.print(f"[yellow]no memory limit: {limits.refusal}[/]; every subject runs without one")
        for name in arguments.models:
            chosen = effort(name, quick=arguments.quick, rounds=arguments.rounds, passes=arguments.passes)
            campaign = Campaign(
                name,
                arguments.work,
                arguments.subjects,
                arguments.budgets,
                chosen,
                limits,
                lambda t: print(t, flush=True),
            )
            results.append(campaign.run())
    except NarrowboatError as error:
        console.print(f"[red]{error}[/]")
        return 1
    busy = spin_policy_runs(arguments.work) if arguments.default_openmp_busy else []
    _write(arguments.out, results, machine_facts(limits, results, time.perf_counter() - began), busy, console)
    return 0


def _write(out: Path, results: list[Any], facts: dict[str, Any], busy: list[Any], console: Console) -> None:
    """Derive medians and ratios, check them, write the three files and print."""
    summary = derive(results)
    verdicts = check(summary)
    record = {"machine": facts, "summary": summary, "checks": verdicts, "spin_policy": busy, "models": results}
    (out / "inference.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_markdown(out / "inference.md", facts, summary, verdicts, busy)
    write_plot(out / "inference.png", summary)
    print_table(console, summary)
    print_checks(console, verdicts)
    console.print(f"{facts['wall_seconds']:.0f} s; wrote {out}/inference.json, .md and .png")


if __name__ == "__main__":
    sys.exit(main())
