"""narrowboat on a GPU, side by side: inference beside resident PyTorch, accelerate, diffusers and flextensor; a task's
swap; tasks with deadlines; training beside recompute.

Every subject runs in a child process of its own. Results are written after each child, so that nothing is lost when
the time is over, and ``--resume`` goes on with what is missing. Writes ``cuda.json`` and ``cuda.md``.

    python benchmarks/gpu.py --out cuda.json                   # an H100 of 80 GB: 15 to 20 minutes
    python benchmarks/gpu.py --quick --out cuda.json           # less than 8 minutes
    python benchmarks/gpu.py --only vit,swap --out cuda.json
    python benchmarks/gpu.py --resume cuda.json --out cuda.json --again vit/narrowboat
    python benchmarks/gpu.py --device emulated:256MiB:1GB --small --out /tmp/cuda.json     # that it works, no GPU
    python benchmarks/gpu.py --report cuda.json                # tables and checks anew, measuring nothing
"""

from __future__ import annotations

import os

# Before torch is imported: libgomp does not see it later, and asking for devices must not start CUDA in the parent.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import argparse
import contextlib
import gc
import importlib
import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from cuda_kit import machine
from cuda_kit.campaign import Campaign, PartFailedError
from cuda_kit.checks import check
from cuda_kit.children import Children, become
from cuda_kit.commands import narrowboat
from cuda_kit.derive import derive
from cuda_kit.effort import FULL, QUICK, SMALL, Effort
from cuda_kit.nvml import Nvml
from cuda_kit.report import markdown
from cuda_kit.results import Results, write_whole

PARTS = ("vit", "swap", "decoder", "training", "tasks")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or emulated:CAPACITY:BANDWIDTH (%(default)s)")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("cuda.json"), help="results; tables beside it, as .md")
    parser.add_argument("--quick", action="store_true", help="one round, the batch sizes that tell most")
    parser.add_argument("--small", action="store_true", help="models of a few megabytes, to see that it works")
    parser.add_argument("--minutes", type=float, help="after which no child is begun (default: 24; 7.5 if --quick)")
    parser.add_argument("--resume", type=Path, help="results of an earlier run: what is there is not measured again")
    parser.add_argument("--again", default="", help="with --resume: keys that are measured again, by how they begin")
    parser.add_argument("--work", type=Path, default=Path("bench-work/cuda"), help="folder on storage (%(default)s)")
    parser.add_argument("--fast", type=Path, help="folder for weights that are read often (default: in memory)")
    parser.add_argument("--commit", help="what is measured (default: by git)")
    parser.add_argument("--spawn", action="store_true", help="start children anew instead of forking them")
    parser.add_argument("--report", type=Path, help="write tables and checks of this file anew, and measure nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.only = [part for part in arguments.only.split(",") if part]
    for part in arguments.only:
        if part not in PARTS:
            parser.error(f"no part {part!r}: there are {', '.join(PARTS)}")
    if arguments.again and arguments.resume is None:
        parser.error("--again goes with --resume")
    return arguments


def main() -> int:
    """Run the benchmark; 0 if it ran, whatever it showed."""
    arguments = _arguments()
    if arguments.child:
        told = json.loads(arguments.child)
        return become(told["call"], told["arguments"], Path(told["log"]), told["parent"])
    if arguments.report is not None:
        results = Results(arguments.report, "", arguments.report)
        results.data["runs"].pop()
        _finish(results, results.data["machine"]["is_cuda"])
        return 0
    signal.signal(signal.SIGTERM, _leave)
    effort = SMALL if arguments.small else QUICK if arguments.quick else FULL
    results = Results(arguments.out, _command(), arguments.resume)
    results.forget([prefix for prefix in arguments.again.split(",") if prefix])
    arguments.work.mkdir(parents=True, exist_ok=True)
    work = arguments.work.resolve()
    os.environ["NARROWBOAT_CACHE"] = str(work / "cache")
    nvml = Nvml()
    children = Children(work / "logs", nvml.used, fork=not arguments.spawn)
    began = time.monotonic()
    campaign = Campaign(
        arguments.device,
        arguments.small,
        effort,
        work,
        work,
        results,
        children,
        lambda text: print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True),
        began + 60 * (arguments.minutes or effort.minutes),
    )
    if children.fork:
        _import_for_children()
    refusal = _learn(campaign, nvml, arguments)
    if refusal:
        print(refusal, file=sys.stderr)
        return 1
    _choose_fast(campaign, arguments)
    _measure(campaign, arguments.only, effort)
    results.data["runs"][-1]["minutes"] = round((time.monotonic() - began) / 60, 2)
    _finish(results, campaign.is_cuda)
    return 0


def _leave(*_: Any) -> NoReturn:
    raise SystemExit(143)  # tidying up on the way


def _command() -> str:
    """As typed, to be typed again."""
    return shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])


def _import_for_children() -> None:
    """Import now what children would import each: nothing computes and nothing asks for a device."""
    names = ["inference_child", "swap_child", "tasks_child", "training_child"]
    for name in [*(f"cuda_kit.{each}" for each in names), "accelerate", "diffusers.hooks", "transformers"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    specs = importlib.import_module("cuda_kit.models").specs(small=True)
    for spec in specs.values():
        importlib.import_module("cuda_kit.models").tensor_shapes(spec)
    # Children collect garbage; what is here already need not be copied for that.
    gc.collect()
    gc.freeze()


def _learn(campaign: Campaign, nvml: Nvml, arguments: argparse.Namespace) -> str:
    """What is measured, and on what; returns why it cannot be, or ""."""
    results, children = campaign.results, campaign.children
    outcome = children.run("facts", "cuda_kit.bandwidth:facts", {"device": campaign.device}, timeout=120)
    if outcome.event("facts") is None and children.fork:
        children.fork = False  # something in the parent has started CUDA
        outcome = children.run("facts", "cuda_kit.bandwidth:facts", {"device": campaign.device}, timeout=120)
    event = outcome.event("facts")
    if event is None:
        return f"{campaign.device} cannot be used: {outcome.detail}"
    found = {key: value for key, value in event.items() if key not in ("event", "at")}
    nvml.choose(found.get("uuid", ""))
    before = results.data["machine"]
    if before and before["device"] != found["device"]:
        return f"{arguments.resume} was measured on {before['device']}, and this is {found['device']}"
    if before and before["small"] != campaign.small:
        return f"{arguments.resume} was measured with {'small' if before['small'] else 'full'} models"
    told = {**machine.facts(), **found, **nvml.facts(), "is_cuda": campaign.is_cuda, "forked": children.fork}
    told["small"] = campaign.small
    results.data["machine"] = told
    results.data["runs"][-1]["commit"] = arguments.commit or machine.commit()
    results.data["runs"][-1]["parts"] = arguments.only
    results.write()
    campaign.say(f"{found['device']}, {found['total_bytes'] / 1e9:.1f} GB, {'forked' if children.fork else 'started'}")
    campaign.measure(
        "copies",
        "cuda_kit.bandwidth:copies",
        lambda: {
            "device": campaign.device,
            "sizes": list(campaign.effort.copy_bytes),
            "count": campaign.effort.copies,
        },
        lambda outcome: {key: outcome.event("copies")[key] for key in ("in", "out")},  # type: ignore[index]
        timeout=120,
    )
    if not campaign.small and not results.has("doctor"):
        # What a user does once on a machine: how to read its storage is kept for the runs that do.
        said = narrowboat("doctor", str(campaign.work), "--quick", "--json", timeout=120)
        status = "ok" if said.code == 0 else "error"
        results.put("doctor", {"status": status, "detail": said.text, "document": said.document})
    return ""


def _choose_fast(campaign: Campaign, arguments: argparse.Namespace) -> None:
    """Where weights lie that are read again and again, but for the measurement of storage itself."""
    if arguments.fast is not None:
        arguments.fast.mkdir(parents=True, exist_ok=True)
        campaign.fast = arguments.fast.resolve()
    elif not campaign.small:
        models = importlib.import_module("cuda_kit.models")
        chosen = [spec for name, spec in models.specs(small=False).items() if name in arguments.only]
        sizes = [sum(t.numel() * t.element_size() for t in models.tensor_shapes(s).values()) for s in chosen]
        campaign.fast = machine.folder_in_memory(max(sizes, default=0)) or campaign.work
        campaign.say(f"weights in {campaign.fast}")


def _measure(campaign: Campaign, parts: list[str], effort: Effort) -> None:
    """One part after the other; one that cannot go on does not stop the rest."""
    inference = importlib.import_module("cuda_kit.inference")
    for part in parts:
        try:
            if part in ("vit", "decoder"):
                inference.InferencePart(campaign, part, getattr(effort, part)).run()
            else:
                importlib.import_module(f"cuda_kit.{part}").run(campaign)
        except PartFailedError as error:
            campaign.say(f"{part}: {error}")
            campaign.results.put(f"{part}/failed", {"part": part, "status": "error", "detail": str(error)})
        _finish(campaign.results, campaign.is_cuda, quiet=True)


def _finish(results: Results, is_cuda: bool, *, quiet: bool = False) -> None:
    """Derive, check, write both files, and say how it went."""
    data = results.data
    data["derived"] = derive(results.records, is_cuda=is_cuda)
    parts = list(dict.fromkeys(part for run in data["runs"] for part in run.get("parts", [])))
    data["checks"] = check(data["derived"], results.records, parts, judge_times=is_cuda)
    results.write()
    write_whole(results.path.with_suffix(".md"), markdown(data))
    if quiet:
        return
    words = {True: "pass", False: "FAIL", None: "-   "}
    for each in data["checks"]:
        print(f"{words[each['pass']]}  {each['name']}: {each['value']} (target {each['target']})")
    judged = [each["pass"] for each in data["checks"] if each["pass"] is not None]
    print(f"{sum(judged)} of {len(judged)} checks pass; wrote {results.path}")


if __name__ == "__main__":
    sys.exit(main())
