"""The claims of SwapNet, RT-Swap and SAGE that have a public source, each beside what this code does here.

    python benchmarks/papers.py --write                     # all of it into docs/: about half an hour, two quiet cores
    python benchmarks/papers.py --quick                     # smaller subjects, one round: some five minutes
    python benchmarks/papers.py --only rtswap.schedulable   # one row alone; several with commas
    python benchmarks/papers.py --resume --write            # goes on with what was measured at this commit
    python benchmarks/papers.py --list                      # names and claims

Every check runs in child processes forked from one that has imported everything and computed nothing; what is
compared takes turns. Verdicts are computed from what was measured (``papers_kit/verdicts.py``). A check that fails is
shown as failed, with its reason. Exit code 0: all ran; 1: a check failed; 2: bad usage.
"""

from __future__ import annotations

import os

# Before torch is imported, or libgomp does not see it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import argparse
import gc
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported once here instead of in every child, as what follows
import transformers  # noqa: F401
from torch._subclasses import fake_tensor  # noqa: F401

from inference_kit.children import Emit
from inference_kit.measure import read_directly
from inference_kit.report import _processor
from narrowboat.machine.cgroup import writable_memory_cgroup
from narrowboat.zoo import MODELS
from papers_kit.check import Bench, CheckError
from papers_kit.checks import CHECKS
from papers_kit.claims import CLAIMS, chosen
from papers_kit.effort import FULL, QUICK, Effort
from papers_kit.report import MarkerError, as_json, counted, dumped, filled, page, write
from papers_kit.runner import judge, run_checks
from papers_kit.verdicts import Kind

ROOT = Path(__file__).resolve().parents[1]
_PROBED = 256 << 20  # bytes of the file that the storage is measured with


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller subjects, fewer rounds")
    parser.add_argument("--only", default="", metavar="ID,...", help="these claims alone")
    parser.add_argument("--resume", action="store_true", help="do not repeat what was measured at this commit")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/papers.* and docs/papers.md")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write everything there as well")
    parser.add_argument("--work", type=Path, default=Path("bench-work/papers"), help="folder for weights and logs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where --write writes (default: docs)")
    parser.add_argument("--list", action="store_true", help="print the claims and measure nothing")
    arguments = parser.parse_args(given)
    try:
        arguments.claims = chosen([name for name in arguments.only.split(",") if name])
    except KeyError as unknown:
        parser.error(f"no claim {unknown}: see --list")
    if arguments.write and arguments.only:
        parser.error("--write writes whole tables: leave --only out, or --write")
    return arguments


def main(given: list[str] | None = None) -> int:
    """Run, print and write; 1 if a check failed."""
    arguments = _arguments(given)
    if arguments.list:
        for claim in CLAIMS:
            print(f"{claim.id:24s} {claim.text}")
        return 0
    effort = QUICK if arguments.quick else FULL
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ["NARROWBOAT_CACHE"] = str(work / "cache")
    _import_for_children()
    bench = Bench(effort, work, lambda said: print(f"  {said}", flush=True))
    commit = _commit()
    facts = _facts(bench, effort, commit, arguments)
    print(f"{facts['cores']} cores, {facts['processor']}, torch {facts['torch']}, commit {commit}", flush=True)
    kept = work / f"told-{effort.name}.json"
    told = run_checks(arguments.claims, CHECKS, bench, kept, resume=arguments.resume, commit=commit)
    facts["seconds"] = sum(found["seconds"] for found in told.values())  # those that --resume kept included
    rows = judge(arguments.claims, told)
    for claim, verdict in rows:
        print(f"{verdict.kind!s:24s} {claim.id:24s} {verdict.here}" + (f" ({verdict.why})" if verdict.why else ""))
    print(f"{len(rows)} claims: {counted(rows)}; {facts['seconds']:.0f} s")
    record = dumped(as_json(facts, rows, told))
    if arguments.out is not None:
        write(arguments.out, record)
    if arguments.write:
        try:
            text = filled((arguments.docs / "papers.md").read_text(encoding="utf-8"), facts, rows)
        except (OSError, MarkerError) as error:
            print(f"cannot write the page: {error}", file=sys.stderr)
            return 1
        write(arguments.docs / "benchmarks" / "papers.json", record)
        write(arguments.docs / "benchmarks" / "papers.md", page(facts, rows))
        write(arguments.docs / "papers.md", text)
        print(f"wrote {arguments.docs}/papers.md, benchmarks/papers.md and benchmarks/papers.json")
    return 1 if any(verdict.kind is Kind.FAILED for _, verdict in rows) else 0


def _import_for_children() -> None:
    """Import now what children would import each: building on meta computes nothing, so no thread is started."""
    for name in ("resnet101", "yolov3", "fcn", "vgg19", "efficientnet_lite2", "bert_small", "mobilenet_v2"):
        with torch.device("meta"):
            MODELS[name]()
    gc.collect()
    gc.freeze()


def _facts(bench: Bench, effort: Effort, commit: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    import platform

    return {
        "command": "python benchmarks/papers.py" + " --quick" * arguments.quick + " --write" * arguments.write,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "effort": effort.name,
        "effort_said": effort.said,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "spin": os.environ["GOMP_SPINCOUNT"],
        "omp": os.environ.get("OMP_NUM_THREADS", "not set"),
        "memory_limit": writable_memory_cgroup() or "memory cgroups at hand",
        "bandwidth_bytes_per_s": _bandwidth(bench),
    }


def _bandwidth(bench: Bench) -> float | None:
    """Of direct reads of a file in the work folder; None where it refuses them."""
    path = bench.work / "probe.bin"
    if not path.exists() or path.stat().st_size != _PROBED:
        with path.open("wb") as file:
            for _ in range(_PROBED >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())

    def told(emit: Emit, kind: str, **values: Any) -> None:
        emit("measured" if kind == "bandwidth" else kind, **values)

    try:
        found = bench.apart("bandwidth", lambda emit: read_directly(partial(told, emit), path), 60)
        return float(found["bytes_per_s"])
    except CheckError:
        return None


def _commit() -> str:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    told = subprocess.run(asked, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
