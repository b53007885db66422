"""Generation inside a byte budget, side by side; one pass against its bound; many inputs per sweep.

``decoder``: tokens per second of narrowboat, plain transformers, accelerate, AirLLM and mmap, each in a child process
of its own, interleaved in rounds, the limited ones in a memory cgroup of (warm process without a model) + budget +
slack, the weights out of the page cache at the start. ``single``: VGG-19 at 48 MiB against max(computing, reading).
``map``: ``Session.map`` over many inputs against as many single passes. Writes ``generate.json`` and ``generate.md``.

    make bench-generate                                   # everything, about ten minutes on two cores
    python benchmarks/generate.py --quick --out bench-work/quick
    pip install --no-deps --target FOLDER airllm==4.0.0   # AirLLM, in a folder of its own
    make bench-generate ARGS="--airllm FOLDER"
"""

from __future__ import annotations

import os

# Before torch is imported, or libgomp does not see it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import gc
import json
import logging
import shlex
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch._subclasses import fake_tensor  # noqa: F401 - imported once here instead of in every child

from generate_kit.airllm_site import add_site, airllm_version
from generate_kit.campaign import DecoderCampaign, Effort
from generate_kit.checks import check_decoder, check_map, check_single
from generate_kit.derive import derive_decoder, derive_map
from generate_kit.folders import DECODERS, folders
from generate_kit.mapping import MapRun, run_map
from generate_kit.report import print_tables, write_markdown
from generate_kit.subjects import SUBJECTS
from inference_kit.arguments import make_folders, names, with_resident_first
from inference_kit.campaign import Campaign, Limits, measure_limits
from inference_kit.derive import derive
from inference_kit.effort import effort
from inference_kit.report import machine_facts, print_checks
from narrowboat.errors import NarrowboatError
from narrowboat.quantities import format_bytes
from narrowboat.zoo import MODELS

PARTS = ("decoder", "single", "map")
SINGLE_BUDGET = 48 << 20
EFFORT = Effort(rounds=3, other_rounds=2, prompt=8, tokens=12, other_seconds=8.0, timeout=60.0)
QUICK = Effort(rounds=1, other_rounds=1, prompt=8, tokens=6, other_seconds=3.0, timeout=20.0)
MAPS = (MapRun("mlp", 4, 64, 2), MapRun("llama_1b", 4, 64, 1))
QUICK_MAPS = (MapRun("minilm", 3, 4, 1),)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="of the decoder (default: all)")
    parser.add_argument("--divisor", type=float, default=4.0, help="of the decoder's weights (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="rounds for every subject (default: fewer for the slow ones)")
    parser.add_argument("--tokens", type=int, help="new tokens")
    parser.add_argument("--quick", action="store_true", help="small models, one round: shows that it runs")
    parser.add_argument("--airllm", type=Path, metavar="FOLDER", help="where AirLLM is installed, if not here")
    parser.add_argument("--slack", type=int, default=64, help="MiB on top of the limit (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="folder for weights files")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for the results")
    parser.add_argument("--again", type=Path, help="derive the results anew from a generate.json, measuring nothing")
    arguments = parser.parse_args()
    arguments.parts = names(parser, arguments.parts, PARTS, "part")
    arguments.subjects = with_resident_first(names(parser, arguments.subjects, SUBJECTS, "subject"), SUBJECTS)
    if any(n is not None and n < 2 for n in (arguments.tokens,)) or (arguments.rounds or 1) < 1:
        parser.error("--rounds must be at least 1, --tokens at least 2")
    if not arguments.divisor >= 0.1:
        parser.error("--divisor divides the weights, such as 4")
    return arguments


def _import_for_children(airllm: bool) -> None:
    """Import now what children would import each: building on meta computes nothing, so no thread is started."""
    warnings.filterwarnings("ignore", module="airllm")
    with torch.device("meta"):
        for factory in DECODERS.values():
            factory()
        MODELS["vgg19"]()
    import tokenizers  # noqa: F401
    import transformers.conversion_mapping
    import transformers.core_model_loading
    import transformers.generation  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import narrowboat.stream.pretrained  # noqa: F401

    if airllm:
        import airllm as _  # noqa: F401
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    gc.collect()
    gc.freeze()


def main() -> int:
    """Run the benchmark; 0 if it ran, whatever it showed."""
    arguments = _arguments()
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 170)
    make_folders(arguments)
    if arguments.again is not None:
        _write(arguments.out, json.loads(arguments.again.read_text(encoding="utf-8")), console)
        return 0
    began = time.perf_counter()
    airllm = add_site(arguments.airllm)
    if not airllm and "airllm" in arguments.subjects and "decoder" in arguments.parts:
        console.print("[yellow]AirLLM is not installed: see --airllm[/]")
    if not airllm:
        arguments.subjects = [name for name in arguments.subjects if name != "airllm"]
    _import_for_children(airllm)
    try:
        limits = measure_limits(arguments.work, arguments.slack << 20)
        if limits.refusal:
            console.print(f"[yellow]no memory limit: {limits.refusal}[/]; every subject runs without one")
        raw: dict[str, Any] = {
            "decoder": _decoder(arguments, limits) if "decoder" in arguments.parts else None,
            "single": _single(arguments, limits) if "single" in arguments.parts else None,
            "maps": _maps(arguments) if "map" in arguments.parts else [],
        }
    except NarrowboatError as error:
        console.print(f"[red]{error}[/]")
        return 1
    facts = machine_facts(limits, [r for r in (raw["decoder"], raw["single"]) if r], time.perf_counter() - began)
    if airllm:
        facts["packages"]["airllm"] = airllm_version()
    command = f"python benchmarks/generate.py {shlex.join(_shareable(sys.argv[1:]))}".strip()
    _write(arguments.out, {"command": command, "machine": facts, "raw": raw}, console)
    return 0


def _shareable(given: list[str]) -> list[str]:
    """The command line without this machine's folders."""
    return [Path(word).name if word.startswith("/") else word for word in given]


def _say(text: str) -> None:
    print(text, flush=True)


def _decoder(arguments: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    chosen = QUICK if arguments.quick else EFFORT
    if arguments.rounds is not None:
        chosen = replace(chosen, rounds=arguments.rounds, other_rounds=arguments.rounds)
    if arguments.tokens is not None:
        chosen = replace(chosen, tokens=arguments.tokens)
    name = "tiny_llama" if arguments.quick else "llama_1b"
    campaign = DecoderCampaign(name, arguments.work, arguments.subjects, arguments.divisor, chosen, limits, _say)
    return campaign.run()


def _single(arguments: argparse.Namespace, limits: Limits) -> dict[str, Any]:
    name = "resnet101" if arguments.quick else "vgg19"
    chosen = effort(name, quick=arguments.quick, rounds=1 if arguments.quick else 3, passes=None)
    if not arguments.quick:
        chosen = replace(chosen, seconds=10.0)  # passes of a tight budget may be slow, and the first do not count
    subjects = ["resident", "narrowboat"]
    campaign = Campaign(name, arguments.work, subjects, [], chosen, limits, _say)
    campaign.add_budget(SINGLE_BUDGET)
    return campaign.run()


def _maps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for run in QUICK_MAPS if arguments.quick else MAPS:
        packed = folders(run.model, arguments.work).packed_file()
        told = run_map(run, arguments.work, packed if packed.exists() else None)
        _say(f"map {run.model}: {told['ratio']:.2f} x over {run.inputs} inputs")
        found.append(told)
    return found


def _write(out: Path, record: dict[str, Any], console: Console) -> None:
    """Derive figures, check them, write the two files and print."""
    raw = record["raw"]
    cells = derive([raw["single"]]) if raw["single"] else []
    maps = [
        {**{k: told[k] for k in ("model", "budget", "divisor", "inputs")}, "cell": derive_map(told["runs"])}
        for told in raw["maps"]
    ]
    decoder = derive_decoder(raw["decoder"]) if raw["decoder"] else None
    verdicts = check_decoder(decoder) if decoder else []
    for cell in cells:
        verdicts += check_single(cell, f"{cell['model']} at {format_bytes(cell['budget_bytes'])}")
    for told in maps:
        verdicts += check_map(told["model"], told["inputs"], told["cell"])
    whole = {
        "command": record["command"],
        "machine": record["machine"],
        "decoder": decoder,
        "single": cells,
        "maps": maps,
        "checks": verdicts,
        "raw": raw,
    }
    (out / "generate.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    write_markdown(out / "generate.md", whole)
    print_tables(console, whole)
    print_checks(console, verdicts)
    console.print(f"{record['machine']['wall_seconds']:.0f} s; wrote {out}/generate.json and .md")


if __name__ == "__main__":
    sys.exit(main())
