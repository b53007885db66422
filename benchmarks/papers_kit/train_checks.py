"""Training inside a budget, beside the plain step and the static ways that SAGE is compared with."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from inference_kit.children import Emit, run_child
from narrowboat.quantities import format_bytes
from papers_kit.check import Bench, CheckError, Measurement
from training_kit.campaign import Campaign, Options, new_record
from training_kit.child import Order, check, minimum
from training_kit.measure import LiveStorages
from training_kit.models import WORKLOADS
from training_kit.subjects import SUBJECTS, Setting
from training_kit.verdicts import judge

_MODELS = ("resnet50", "densenet121", "mobilenet_v2", "bert_small")
_ROOM = 1.04  # times the smallest budget: plans at the very smallest are refused by a hair
_TIMEOUT = 400.0
_THREADS = 1


def folds(bench: Bench) -> Measurement:
    """Each network trained in about the least memory that it can be: activations and all bytes beside plain's."""
    rows = []
    for model, batch in bench.effort.folds:
        plain = _checked(bench, model, batch, Setting("plain"))
        least = _least(bench, model, batch)
        ours = _checked(bench, model, batch, Setting("narrowboat", budget=int(least * _ROOM), asked="minimum"))
        rows.append(
            {
                "model": model,
                "batch": batch,
                "fold": plain["tensor_activations"] / max(ours["tensor_activations"], 1),
                "all": plain["tensor_peak"] / ours["tensor_peak"],
                "plain": plain["tensor_activations"],
                "ours": ours["tensor_activations"],
                "within": ours["tensor_peak"] <= ours["budget"],
            }
        )
        bench.say(f"{model}, batch {batch}: {rows[-1]['fold']:.1f} times less activations")
    return told_of(rows)


def told_of(rows: list[dict[str, Any]]) -> Measurement:
    """What the claims need; pure."""
    best = max(rows, key=lambda row: row["fold"])
    return {
        "rows": rows,
        "fold": best["fold"],
        "all": best["all"],
        "best": f"{best['model']} at batch {best['batch']}",
        "told": "; ".join(
            f"{r['model']}, batch {r['batch']}: {r['fold']:.1f} x ({format_bytes(r['plain'])} to "
            f"{format_bytes(r['ours'])}), all bytes {r['all']:.1f} x"
            for r in rows
        ),
        "within_budget": all(row["within"] for row in rows),
        "models": len(rows),
    }


def _order(bench: Bench, model: str, batch: int, setting: Setting, exact: bool = False) -> Order:
    return Order(model, batch, setting, _THREADS, bench.work / "training", exact)


def _checked(bench: Bench, model: str, batch: int, setting: Setting) -> dict[str, Any]:
    log = bench.work / "logs" / f"fold-{model}-{setting.subject}.jsonl"
    outcome = run_child(partial(check, _order(bench, model, batch, setting)), log=log, timeout=_TIMEOUT)
    record = new_record(setting, outcome)
    if record["status"] != "ok":
        raise CheckError(f"{model}, {SUBJECTS[setting.subject].label}: {record['status']}: {record['detail']}")
    return record


def _least(bench: Bench, model: str, batch: int) -> int:
    setting = Setting("narrowboat", budget=1)
    log = bench.work / "logs" / f"fold-{model}-minimum.jsonl"
    outcome = run_child(partial(minimum, _order(bench, model, batch, setting)), log=log, timeout=_TIMEOUT)
    found = outcome.event("minimum")
    if found is None:
        raise CheckError(f"{model}: no smallest budget was told: {outcome.detail}")
    return int(found["bytes"])


def rivals(bench: Bench) -> Measurement:
    """BERT-small beside static recompute, static accumulation and both: rate at their memory, and gradients."""
    effort = bench.effort
    options = Options(
        subjects=("plain", *effort.rival_ways, "narrowboat"),
        shares=effort.rival_shares,
        ratios=(),
        splits=(4,),
        rounds=effort.rival_rounds,
        steps=effort.rival_steps,
        settling=2,
        threads=_THREADS,
        timeout=_TIMEOUT,
        ablation=False,
        work=bench.work / "training",
    )
    result = Campaign("bert_small", effort.rival_batch, options, bench.say).run()
    return rivals_told(result)


def rivals_told(result: dict[str, Any]) -> Measurement:
    """What the claims need of the training benchmark's records; pure."""
    records = result["records"]
    ours = [r for r in records if r["subject"] == "narrowboat" and r["status"] == "ok"]
    if not ours:
        refused = next((r["detail"] for r in records if r["subject"] == "narrowboat"), "it was not run")
        raise CheckError(f"narrowboat trained in no setting: {refused}")
    beside = []
    for static in (r for r in records if SUBJECTS[r["subject"]].static and r.get("seconds")):
        mine = [r["seconds"] for r in ours if r.get("seconds") and r["allocator_peak"] <= static["allocator_peak"]]
        if mine:
            label = SUBJECTS[static["subject"]].label
            beside.append((static["seconds"] / min(mine), f"{label} {static['seconds'] / min(mine):.2f}"))
    if not beside:
        raise CheckError("no setting of narrowboat peaks as low as a static one")
    split = [r for r in ours if r["sameness"] == "rounding"]
    verdicts = judge(result)
    return {
        "model": result["model"],
        "batch": result["batch"],
        "settings": len(ours),
        "rate": statistics.median(ratio for ratio, _ in beside),
        "worst_rate": min(ratio for ratio, _ in beside),
        "told": "; ".join(words for _, words in beside),
        "same_gradients": all(r["sameness"] in ("bits", "rounding") for r in ours),
        "with_the_same_bits": sum(r["sameness"] == "bits" for r in ours),
        "split": len(split),
        "distance": f"{max((r['difference'] or 0.0 for r in split), default=0.0):.0e}",
        "within_budget": all(v["passed"] for v in verdicts if "within the budget" in v["what"]),
        "buffers_and_random_same": all(v["passed"] for v in verdicts if "buffers and random" in v["what"]),
    }


def footprint(bench: Bench) -> Measurement:
    """The most bytes of activations alive in a training step over those in inference, for SAGE's four networks."""
    rows = {}
    for model in _MODELS:
        body = partial(_footprint, model, bench.effort.ratio_batch)
        found = bench.apart(f"footprint-{model}", body, 180)
        rows[model] = found["training"] / found["inference"]
        bench.say(f"{model}: training takes {rows[model]:.1f} times the activations of inference")
    return {
        "rows": rows,
        "batch": bench.effort.ratio_batch,
        "told": ", ".join(f"{model} {ratio:.1f} x" for model, ratio in rows.items()),
        "least": min(rows.values()),
        "most": max(rows.values()),
        "median": statistics.median(rows.values()),
        "in_range": sum(5 <= ratio <= 100 for ratio in rows.values()),
        "models": len(rows),
    }


def _footprint(model: str, batch: int, emit: Emit) -> None:
    torch.set_num_threads(_THREADS)
    workload = WORKLOADS[model]
    inputs, targets = workload.data(batch)
    module = workload.build()
    peaks = {}
    for kind in ("inference", "training"):
        module.train(kind == "training")
        with LiveStorages() as live:
            if kind == "inference":
                with torch.no_grad():
                    module(inputs)
            else:
                workload.loss(module(inputs), targets).backward()
            live.keep(p.grad for p in module.parameters() if p.grad is not None)
        peaks[kind] = live.ledger.peak(kept=False)
    emit("measured", **peaks)


def techniques(bench: Bench) -> Measurement:
    """The smallest budget of MobileNet-v2 with one family of techniques allowed, and with none."""
    batch = bench.effort.technique_batch
    families: dict[str, tuple[str, ...]] = {
        "none": (),
        "recompute": ("recompute",),
        "reduce": ("reduce",),
        "fuse": ("fuse",),
        "low_memory": ("low_memory",),
    }
    least = {}
    for name, allowed in families.items():
        setting = Setting("narrowboat", budget=1, techniques=allowed)
        order = _order(bench, "mobilenet_v2", batch, setting)
        log = bench.work / "logs" / f"technique-{name}.jsonl"
        outcome = run_child(partial(minimum, order), log=log, timeout=_TIMEOUT)
        found = outcome.event("minimum")
        if found is None:
            raise CheckError(f"techniques {allowed}: no smallest budget was told: {outcome.detail}")
        least[name] = int(found["bytes"])
        bench.say(f"mobilenet_v2, techniques {name}: at least {format_bytes(least[name])}")
    return least_told(least) | {"model": "mobilenet_v2", "batch": batch}


def least_told(least: dict[str, int]) -> Measurement:
    """What the claims need of the smallest budgets by technique; pure."""
    none = least["none"]
    return {
        "none": format_bytes(none),
        "told": ", ".join(f"{k.replace('_', '-')} {format_bytes(v)}" for k, v in least.items() if k != "none"),
        "reduction_helps": least["reduce"] < none,
        "fusion_helps": least["fuse"] < none,
        "operators_help": least["low_memory"] < none,
        "recompute_helps": least["recompute"] < none,
    }
