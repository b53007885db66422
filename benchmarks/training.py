"""Training inside a byte budget, side by side: narrowboat, plain PyTorch, static recompute and accumulation,
torch.compile's activation_memory_budget, save_on_cpu and accelerate's batch-size finder.

Every setting runs in child processes of its own: one checks gradients and measures peaks, untimed; then, in rounds
that take turns, one for each setting is timed. Writes ``training.json`` and ``training.md`` (and ``training.png`` with
``--plot``); models that a run leaves out stay in training.json as they were.

    make bench-training                                    # everything: some hours on one core
    make bench-training ARGS="--quick --models mobilenet_v2"
    python benchmarks/training.py --models resnet50 --batches resnet50=128 --subjects narrowboat --budgets 10
    python benchmarks/training.py --again --plot           # tables and plot anew, measuring nothing
"""

from __future__ import annotations

import os

# Before torch is imported, or libgomp does not see it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # 75 MiB and a second, once here instead of in every child
from torch._subclasses import fake_tensor  # noqa: F401 - the same

from narrowboat import zoo
from training_kit.campaign import Campaign, Options
from training_kit.models import WORKLOADS
from training_kit.report import write_markdown, write_plot
from training_kit.subjects import SUBJECTS


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="MODEL")
    parser.add_argument("--subjects", nargs="*", default=list(SUBJECTS), choices=list(SUBJECTS), metavar="SUBJECT")
    parser.add_argument("--budgets", nargs="*", type=float, default=[80, 50, 25, 10], help="percent of activations")
    parser.add_argument("--batches", nargs="*", default=[], metavar="MODEL=N", help="samples of a step")
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.5, 0.2], help="torch.compile's")
    parser.add_argument("--splits", nargs="*", type=int, default=[2, 4, 8], help="batch over static micro-batch")
    parser.add_argument("--rounds", type=int, default=3, help="timed children of every setting")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of every child")
    # The check of splitting is made again after the 1st, 2nd and 4th step, and takes longer than a step.
    parser.add_argument("--settling", type=int, default=4, help="steps between the first and the timed ones")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds of one child")
    parser.add_argument("--ablation", action="store_true", help="also without each technique, and with each alone")
    parser.add_argument("--quick", action="store_true", help="one round of two steps, one of everything")
    parser.add_argument("--plot", action="store_true", help="also draw training.png")
    parser.add_argument("--again", action="store_true", help="write anew what training.json holds, measuring nothing")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="folder for logs and caches")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.batches = _batches(parser, arguments.batches)
    if min(arguments.rounds, arguments.steps, arguments.threads) < 1 or arguments.settling < 0:
        parser.error("--rounds, --steps and --threads are at least 1, --settling is not negative")
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
        arguments.budgets, arguments.ratios, arguments.splits = arguments.budgets[:1], arguments.ratios[:1], [4]
    return arguments


def _batches(parser: argparse.ArgumentParser, texts: list[str]) -> dict[str, int]:
    batches = {name: workload.batch for name, workload in WORKLOADS.items()}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in batches or not number.isdigit() or not int(number):
            parser.error(f"--batches takes MODEL=N, not {text!r}")
        batches[name] = int(number)
    return batches


def main() -> None:
    """Measure what was asked for, and write what is known."""
    arguments = _arguments()
    kept = arguments.out / "training.json"
    told: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"machine": {}, "models": {}}
    if not arguments.again:
        _measure(arguments, told, kept)
    write_markdown(arguments.out / "training.md", told)
    if arguments.plot:
        write_plot(arguments.out / "training.png", told)
    print(f"wrote {arguments.out}/training.md")


def _measure(arguments: argparse.Namespace, told: dict[str, Any], kept: Path) -> None:
    """Model by model, each written as soon as it is measured."""
    work = arguments.work.resolve() / "training"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    _import_for_children(arguments.models)
    options = Options(
        subjects=tuple(arguments.subjects),
        shares=tuple(percent / 100 for percent in arguments.budgets),
        ratios=tuple(arguments.ratios),
        splits=tuple(arguments.splits),
        rounds=arguments.rounds,
        steps=arguments.steps,
        settling=arguments.settling,
        threads=arguments.threads,
        timeout=arguments.timeout,
        ablation=arguments.ablation,
        work=work,
    )
    told["machine"] = _machine(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        campaign = Campaign(name, arguments.batches[name], options, lambda text: print(text, flush=True))
        told["models"][name] = {"measured": _how(), **campaign.run()}
        kept.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _import_for_children(models: list[str]) -> None:
    """Import now what children would import each: building on meta computes nothing, so no thread is started."""
    for name in models:
        with torch.device("meta"):
            zoo.get(name)()
    gc.collect()
    gc.freeze()


def _how() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    options = [each for each in sys.argv[1:] if "/" not in each and each not in ("--work", "--out")]
    return f"{time.strftime('%Y-%m-%d')}, commit {commit or 'unknown'}: {' '.join(options)}"


def _machine(threads: int) -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "threads": threads,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
