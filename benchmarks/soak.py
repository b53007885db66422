"""Long runs in child processes: does memory creep, and what does a block cost in bookkeeping? Prints JSON.

    python benchmarks/soak.py [--passes 10000] [--layers 1000]

``soak``: many passes of a small model that streams all of its weights; resident memory of the process at intervals.
``overhead``: a model of many tiny layers with everything resident, against plain PyTorch, passes of the two taking
turns: what an entry and an exit of a module cost on top.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ENVIRONMENT = {**os.environ, "GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "1"}


def soak(passes: int, folder: Path) -> dict[str, Any]:
    """RSS in bytes at ten moments of ``passes`` passes; every answer is checked."""
    import gc

    import torch
    from torch import nn

    import narrowboat as nb
    from narrowboat.machine.memory import process_memory
    from narrowboat.profile import workload

    torch.set_num_threads(1)
    workload.TARGET, workload.SMALL = 1 << 15, 1 << 12  # blocks as small as the model

    def factory() -> nn.Module:
        return nn.Sequential(*[nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96)) for _ in range(8)])

    torch.manual_seed(0)
    x, plain = torch.ones(1, 96), factory()
    path = folder / "soak.safetensors"
    nb.pack(plain.state_dict(), path)
    model = nb.stream(factory, path, budget=smallest(factory, path, x), example=(x,))
    session = nb.session(model)
    rss: list[int] = []
    with torch.inference_mode():
        want = plain(x)
        for number in range(passes):
            if number % max(passes // 10, 1) == 0:
                gc.collect()
                rss.append(process_memory().rss)
            if not torch.equal(model(x), want):
                raise SystemExit(f"pass {number} gave another answer")
    rss.append(process_memory().rss)
    stats = session.stats()
    session.close()
    return {
        "passes": stats["passes"],
        "blocks_streamed": len(session.plan.streamed),
        "rss_bytes": rss,
        "grown_after_first_tenth_bytes": rss[-1] - rss[1],
        "median_latency_ms": stats["median_latency_ms"],
    }


def overhead(layers: int, folder: Path) -> dict[str, Any]:
    """Microseconds per layer on top of plain PyTorch, all resident; medians over passes that take turns."""
    import statistics
    import time

    import torch
    from torch import nn

    import narrowboat as nb

    torch.set_num_threads(1)

    def factory() -> nn.Module:
        return nn.Sequential(*[nn.Linear(8, 8) for _ in range(layers)])

    torch.manual_seed(0)
    x, plain = torch.ones(1, 8), factory()
    path = folder / "overhead.safetensors"
    nb.pack(plain.state_dict(), path)
    model = nb.stream(factory, path, budget="512MiB", example=(x,))
    taken: dict[str, list[float]] = {"plain": [], "streamed": []}
    with torch.inference_mode():
        for _ in range(5):
            model(x), plain(x)
        for _ in range(40):
            for name, net in (("plain", plain), ("streamed", model)):
                start = time.perf_counter()
                net(x)
                taken[name].append(time.perf_counter() - start)
        exact = torch.equal(model(x), plain(x))
    nb.session(model).close()
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "layers": layers,
        "plain_ms": medians["plain"] * 1e3,
        "streamed_ms": medians["streamed"] * 1e3,
        "overhead_us_per_layer": (medians["streamed"] - medians["plain"]) / layers * 1e6,
        "bit_identical": exact,
    }


def smallest(factory: Any, path: Path, x: Any) -> int:
    """The smallest budget in bytes that streams the model."""
    import narrowboat as nb

    try:
        nb.stream(factory, path, budget=1, example=(x,))
    except nb.BudgetError as error:
        return error.minimum
    raise SystemExit("a budget of one byte was accepted")


def in_child(what: str, number: int) -> dict[str, Any]:
    """Run one of the two above in a process of its own."""
    child = subprocess.run(
        [sys.executable, __file__, "--only", what, "--number", str(number)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    if child.returncode != 0:
        return {"failed": f"exit code {child.returncode}"}
    result: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--only", choices=["soak", "overhead"], help="run this one here, for the parent process")
    parser.add_argument("--number", type=int, default=0, help="passes or layers of --only")
    arguments = parser.parse_args()
    if arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            work = {"soak": soak, "overhead": overhead}[arguments.only]
            print(json.dumps(work(arguments.number, Path(folder))))
        return
    told = {"soak": in_child("soak", arguments.passes), "overhead": in_child("overhead", arguments.layers)}
    print(json.dumps(told, indent=2))
    if any("failed" in result for result in told.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
