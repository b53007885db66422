"""One model on one, two and three nodes: predicted latency and throughput of the pipeline beside measured ones.

Needs a Ray cluster that this process is connected to, with nodes that offer memory. Storage is the real disk: when
the nodes are raylets on one machine they share it, its cores and its memory bus, and ``shared_machine`` says so;
stages then slow one another down, which no prediction made node by node knows.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from narrowboat.cluster.pipeline import Pipeline
from narrowboat.errors import ClusterError


def measure_pipeline(
    factory: Callable[[], nn.Module],
    weights: Path,
    example: tuple[Any, ...],
    nodes: Sequence[str],
    budget: int,
    *,
    counts: Sequence[int] = (1, 2, 3),
    calls: int = 10,
    inputs: int = 24,
    threads: int = 1,
    want: Any = None,
) -> dict[str, Any]:
    """Run the model as so many stages, each on a node of its own.

    Args:
        factory: makes the module; importable on the nodes.
        weights: path of its weights on every node.
        example: inputs of one pass.
        nodes: names or identities.
        budget: bytes of each stage.
        counts: numbers of stages.
        calls: single calls, the first two of which settle the plans; at least three.
        inputs: of one ``map``; at least six.
        threads: of every operator on each node.
        want: what plain PyTorch answers, with as many threads; None to compare nothing.

    Returns:
        ``model``, ``weights_bytes``, ``budget_bytes``, ``threads``, ``cores``, ``shared_machine``, ``storage``, and
        ``runs``: for each count ``stages`` and either ``refused`` or the milliseconds ``predicted_latency_ms`` and
        ``predicted_period_ms`` (of the plans in force, after passes were measured), ``planned_*`` (before), what was
        measured, inputs per second ``predicted_throughput`` and ``measured_throughput``, ``start_seconds``,
        ``same_bits`` (None where nothing was compared), and ``detail``: what ``Pipeline.stats`` says.
    """
    import ray

    if calls < 3 or inputs < 6:
        raise ValueError("calls has to be at least 3 and inputs at least 6: the first ones settle the plans")
    hosts = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    runs = [_run(factory, weights, example, nodes[:n], budget, calls, inputs, threads, want) for n in counts]
    return {
        "model": getattr(factory, "name", getattr(factory, "__name__", "model")),
        "weights_bytes": weights.stat().st_size if weights.is_file() else None,
        "budget_bytes": budget,
        "threads": threads,
        "cores": len(os.sched_getaffinity(0)),
        "shared_machine": len(hosts) == 1,
        "storage": "the real disk, not slowed down",
        "runs": runs,
    }


def _run(
    factory: Callable[[], nn.Module],
    weights: Path,
    example: tuple[Any, ...],
    nodes: Sequence[str],
    budget: int,
    calls: int,
    inputs: int,
    threads: int,
    want: Any,
) -> dict[str, Any]:
    begin = time.perf_counter()
    try:
        pipeline = Pipeline(
            factory, weights, example=example, nodes=nodes, budget=budget, stages=len(nodes), threads=threads
        )
    except ClusterError as error:
        return {"stages": len(nodes), "refused": f"{type(error).__name__}: {error}"}
    with pipeline:
        started = time.perf_counter() - begin
        latencies, same = [], True
        for _ in range(calls):
            begin = time.perf_counter()
            got = pipeline(*example)
            latencies.append(time.perf_counter() - begin)
            same = same and (want is None or _same(want, got))
        for got in pipeline.map([example] * inputs):
            same = same and (want is None or _same(want, got))
        told = pipeline.stats()
        return {
            "stages": len(nodes),
            "start_seconds": started,
            "planned_latency_ms": told["planned_latency_ms"],
            "predicted_latency_ms": told["predicted_latency_ms"],
            "measured_latency_ms": statistics.median(latencies[2:]) * 1e3,
            "planned_period_ms": told["planned_period_ms"],
            "predicted_period_ms": told["predicted_period_ms"],
            "measured_period_ms": told["measured_period_ms"],
            "predicted_throughput": 1e3 / told["predicted_period_ms"],
            "measured_throughput": 1e3 / told["measured_period_ms"],
            "same_bits": None if want is None else same,
            "detail": told,
        }


def _same(one: Any, other: Any) -> bool:
    """Equal bits, tensor by tensor."""
    pairs = zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=True)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))
