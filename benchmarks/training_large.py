"""Fine-tuning models larger than their memory, and a budget that is cut in the middle; each in a child process.

    python benchmarks/training_large.py lora   # 1.1 billion parameters, adapters, under 1 GiB
    python benchmarks/training_large.py full   # weights, gradients and optimizer state on storage, beside memory
    python benchmarks/training_large.py cut    # the budget falls from 100 to 30 %, float64
    python benchmarks/training_large.py digits # a classifier in a tenth of its activations

Prints one JSON line per subject. Peaks are the child's VmHWM beyond what it had before the model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20
SPINS = {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}


def main() -> None:
    """Run the subjects asked for, one child each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", choices=("lora", "full", "cut", "digits"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "narrowboat-training")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        print(json.dumps(globals()[f"_{arguments.child}"](arguments.work, arguments.steps)))
        return
    for subject in arguments.subjects:
        for child in {"lora": ["lora"], "full": ["full", "twin_plain", "twin"], "cut": ["cut"], "digits": []}[subject]:
            command = [sys.executable, __file__, subject, "--child", child, "--work", str(arguments.work)]
            command += ["--steps", str(arguments.steps)]
            done = subprocess.run(command, env={**os.environ, **SPINS}, capture_output=True, text=True, check=False)
            print(
                child,
                done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr[-2000:],
                flush=True,
            )
        if subject == "digits":
            script = Path(__file__).parents[1] / "examples" / "digits.py"
            subprocess.run([sys.executable, str(script)], env={**os.environ, **SPINS}, check=True)


def _folder(work: Path, name: str, **changes: Any) -> Path:
    """A Hugging Face folder with random weights, made once, in a process of its own."""
    folder = work / name
    if not (folder / "config.json").exists():
        code = (
            "import sys, json, torch\nfrom narrowboat.zoo.llama import decoder\ntorch.manual_seed(0)\n"
            "changes = json.loads(sys.argv[2]); dtype = getattr(torch, changes.pop('dtype', 'bfloat16'))\n"
            "decoder(dtype, **changes).save_pretrained(sys.argv[1])\n"
        )
        subprocess.run([sys.executable, "-c", code, str(folder), json.dumps(changes)], check=True, capture_output=True)
    return folder


class _Peak:
    """Resident memory beyond the beginning; made before the model, when the libraries are loaded."""

    def __init__(self) -> None:
        import torch
        import transformers  # noqa: F401

        from narrowboat.machine.memory import process_memory
        from narrowboat.profile.warmup import warm_up, warm_up_tracer

        warm_up()
        warm_up_tracer()
        torch.randn(64, 64, requires_grad=True).mm(torch.randn(64, 64)).sum().backward()
        self._memory = process_memory
        self._base = process_memory().rss

    def mib(self) -> float:
        return round((self._memory().hwm - self._base) / MIB, 1)


def _tokens(steps: int, batch: int, length: int, vocabulary: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (batch, length), generator=generator) for _ in range(steps)]


def _lora(work: Path, steps: int) -> dict[str, Any]:
    folder = _folder(work, "llama_1b")
    import torch

    import narrowboat as nb
    from narrowboat.train.lora import add_lora

    peak = _Peak()
    model = nb.stream_pretrained(str(folder), budget="800MiB").train()
    torch.manual_seed(0)
    adapters = add_lora(model, rank=8, alpha=16)
    step = nb.train_step(model, None, torch.optim.AdamW(adapters, 1e-3), budget="1000MiB", adapt=False)
    seconds, losses = [], []
    for ids in _tokens(steps, 1, 64, 32_000):
        start = time.perf_counter()
        losses.append(float(step({"input_ids": ids, "labels": ids})))
        seconds.append(round(time.perf_counter() - start, 1))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "weights_mib": weights // MIB,
        "budget_mib": 1000,
        "vmhwm_mib": peak.mib(),
        "reported_peak_mib": max(r.measured_peak for r in step.report().steps) // MIB,
        "seconds": seconds,
        "losses": losses,
        "plan": step.plan.as_dict(),
    }


_FULL = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "vocab_size": 8000,
    "dtype": "float32",
}
_TWIN = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 4000,
    "dtype": "float32",
}


def _stored(work: Path, steps: int, name: str, shape: dict[str, Any], budget: int, vocabulary: int) -> dict[str, Any]:
    folder = _folder(work, name, **shape)
    import torch

    import narrowboat as nb

    peak = _Peak()
    model = nb.stream_pretrained(str(folder), budget=budget).train().requires_grad_(True)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    store = work / f"{name}_store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    step = nb.train_step(model, None, optimizer, budget=budget, spill=store, adapt=False, micro_batches=1)
    seconds, losses = [], []
    for ids in _tokens(steps, 2, 64, vocabulary):
        start = time.perf_counter()
        losses.append(float(step({"input_ids": ids, "labels": ids})))
        seconds.append(round(time.perf_counter() - start, 1))
    return {
        "weights_mib": nbytes // MIB,
        "weights_and_state_over_budget": round(3 * nbytes / budget, 1),
        "budget_mib": budget // MIB,
        "vmhwm_mib": peak.mib(),
        "reported_peak_mib": max(r.measured_peak for r in step.report().steps) // MIB,
        "written_mib_per_step": step.report().steps[-1].spilled // MIB,
        "seconds": seconds,
        "losses": losses,
    }


def _full(work: Path, steps: int) -> dict[str, Any]:
    return _stored(work, steps, "llama_full", _FULL, 400 * MIB, 8000)


def _twin(work: Path, steps: int) -> dict[str, Any]:
    return _stored(work, steps, "llama_twin", _TWIN, 56 * MIB, 4000)


def _twin_plain(work: Path, steps: int) -> dict[str, Any]:
    folder = _folder(work, "llama_twin", **_TWIN)
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for ids in _tokens(steps, 2, 64, 4000):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return {"losses": losses}


def _cut(work: Path, steps: int) -> dict[str, Any]:
    import torch
    from torch.nn import functional as F

    import narrowboat as nb
    from narrowboat.zoo.gpt import GPT

    def run(cut: bool) -> tuple[list[float], list[int], list[int]]:
        torch.manual_seed(0)
        model = GPT(vocabulary=512, width=256, layers=6, heads=8, context=128).double().train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        step = nb.train_step(
            model,
            lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()),
            optimizer,
            budget="4GiB",
            adapt=False,
        )
        losses = []
        for number, ids in enumerate(_tokens(4 * steps, 8, 128, 512)):
            if number == 2 * steps and cut:
                plan = step.plan
                fixed = plan.static.total
                step.budget = fixed + int(0.3 * (plan.plain_peak - fixed))
            losses.append(float(step(ids, ids)))
        records = step.report().steps
        return losses, [r.predicted_peak // MIB for r in records], [r.micro_batches for r in records]

    uncut, _, _ = run(False)
    cut, peaks, parts = run(True)
    return {
        "largest_difference": max(abs(a - b) / abs(a) for a, b in zip(uncut, cut, strict=True)),
        "predicted_peaks_mib": peaks,
        "micro_batches": parts,
        "losses": [round(value, 4) for value in cut],
    }


if __name__ == "__main__":
    main()
