"""Many inputs per sweep against single passes: 64 inputs through a model that waits for its storage.

    python benchmarks/map.py                          # llama_1b, one token an input, a third of the weights
    python benchmarks/map.py --model mlp              # float32, one row: waits for storage eight times as long
    python benchmarks/map.py --model minilm --divisor 4 --inputs 64 --batch 8

The zoo's decoder of 1.1 billion parameters, given one token, multiplies each of its 2.2 GB of weights with one vector:
it waits for storage. With sixteen tokens it is the processor that takes the time (in bfloat16, on two cores), as in
the zoo's other models, and sweeps gain nothing. Each way runs in child processes of its own, the two taking turns;
every output is digested, and both ways have to give the same. Prints JSON: seconds, bytes read, peak, and the ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", **os.environ}


def child(name: str, path: Path, way: str, budget: int, count: int, batch: int) -> dict[str, Any]:
    """One way, in this process: ``count`` inputs after two that warm up; returns what it took."""
    import torch

    import narrowboat as nb
    from map_models import factory

    made = factory(name)
    inputs = list(varied(made.example_inputs(), count, tokens=1 if name == "llama_1b" else 0))
    model = nb.stream(made, path, budget=budget, example=inputs[0]).eval()
    session = nb.session(model)
    digest = hashlib.sha256()
    with torch.inference_mode():
        for item in inputs[:2]:
            model(*item)
        read, start = session.reader.bytes_read, time.perf_counter()
        outputs = session.map(inputs, batch or None) if way == "map" else (model(*item) for item in inputs)
        for output in outputs:
            for tensor in tensors(output):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        seconds = time.perf_counter() - start
    stats = session.stats()
    return {
        "way": way,
        "seconds": seconds,
        "bytes_read": session.reader.bytes_read - read,
        "group": stats["map_group"],
        "alone": stats["map_alone"],
        "alone_reason": stats["map_alone_reason"],
        "sweep_ms": [round(ms, 1) for ms in stats["map_sweep_ms"]],
        "predicted_sweep_ms": round(stats["map_predicted_sweep_ms"], 1),
        "peak_over_budget": stats["peak_bytes"] - budget,
        "pass_read_ms": [round(ms, 1) for ms in stats["read_ms"]],
        "pass_compute_ms": [round(ms, 1) for ms in stats["compute_ms"]],
        "bandwidth_bytes_per_s": stats["bandwidth_bytes_per_s"],
        "digest": digest.hexdigest(),
    }


def varied(example: tuple[Any, ...], count: int, *, tokens: int) -> Any:
    """``count`` inputs like the example, each with content of its own."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        item = []
        for tensor in example:
            if tensor.is_floating_point():
                item.append(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
            elif int(tensor.max()) > 1:
                shape = (tensor.shape[0], tokens) if tokens else tensor.shape
                item.append(torch.randint(1, int(tensor.max()), tuple(shape), generator=generator, dtype=tensor.dtype))
            else:
                item.append(tensor)  # a mask
        yield tuple(item)


def tensors(value: Any) -> list[Any]:
    """The tensors of an output, in order."""
    import torch
    from torch.utils._pytree import tree_flatten

    leaves = tree_flatten(dict(value) if hasattr(value, "keys") else value)[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def main() -> int:
    """Command line; exit code 1 if the two ways gave different bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_1b")
    parser.add_argument("--weights", type=Path, help="a packed weights file (default: random ones, written first)")
    parser.add_argument("--divisor", type=float, default=3.0, help="the budget is the weights by this")
    parser.add_argument("--inputs", type=int, default=64)
    parser.add_argument("--batch", type=int, default=0, help="inputs per sweep (default: the plan's choice)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        way, budget = args.child
        print(json.dumps(child(args.model, args.weights, way, int(budget), args.inputs, args.batch)))
        return 0
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = args.weights or prepared(args.model, Path(folder))
        budget = int(path.stat().st_size / args.divisor)
        runs: list[dict[str, Any]] = []
        for _ in range(args.rounds):
            for way in ("single", "map"):
                command = [sys.executable, __file__, "--model", args.model, "--weights", str(path)]
                command += ["--inputs", str(args.inputs), "--batch", str(args.batch), "--child", way, str(budget)]
                done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
                if done.returncode:
                    raise SystemExit(done.stderr[-2000:])
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    median = {w: statistics.median(r["seconds"] for r in runs if r["way"] == w) for w in ("single", "map")}
    exact = len({run["digest"] for run in runs}) == 1
    told = {"model": args.model, "budget": budget, "inputs": args.inputs, "median_seconds": median}
    print(json.dumps({**told, "ratio": median["single"] / median["map"], "exact": exact, "runs": runs}, indent=2))
    return 0 if exact else 1


def prepared(name: str, folder: Path) -> Path:
    """Random weights of the model, packed."""
    import torch

    import narrowboat as nb
    from map_models import factory
    from narrowboat.zoo.save import random_tensor

    with torch.device("meta"):
        shapes = factory(name)().state_dict()
    weights = {key: random_tensor(key, tensor, 0) for key, tensor in shapes.items()}
    path = folder / f"{name}.map.safetensors"
    nb.pack(weights, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
