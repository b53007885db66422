"""A data set larger than memory through a model larger than its budget, on 1, 2, 3 nodes: inputs per second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narrowboat import zoo
from narrowboat.checkpoint import open_index, pack
from narrowboat.cluster.dataset import MapStats, map_dataset
from narrowboat.zoo.save import save_random_weights


def measure(
    folder: Path,
    nodes: Sequence[str],
    *,
    model: str = "resnet50",
    side: int = 64,
    rows: int = 3000,
    share: float = 0.5,
    inputs_per_sweep: int | None = None,
) -> dict[str, Any]:
    """Map the same rows on the first node, on the first two, and so on. This process is connected to the cluster.

    Every node has to offer the budget, which is that share of the weights and room for activations. On one machine
    the nodes share cores and storage, and more of them can be no faster than one that has all cores.

    Args:
        folder: for the weights; seen by every node.
        nodes: names.
        model: of the zoo, taking images of any size.
        side: of an image, in pixels; a row is ``3 * side * side`` bytes.
        rows: of the data set.
        share: of the weights that the budget holds.
        inputs_per_sweep: see ``map_dataset``.

    Returns:
        ``model``, ``rows``, ``row_bytes``, ``weight_bytes``, ``budget_bytes``, ``object_store_bytes``, and
        ``runs``: one dict for each number of nodes: ``nodes``, ``seconds`` and ``inputs_per_second`` from the first
        output to the last (starting processes left out), ``start_seconds`` before that, ``by_node`` (``NodeStats``).
    """
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    weights = _weights(model, folder)
    held = open_index(weights).total_bytes
    budget = int(held * share) + (32 << 20)
    runs = [
        _run(weights, model, side, rows, budget, nodes[:count], inputs_per_sweep) for count in range(1, len(nodes) + 1)
    ]
    return {
        "model": model,
        "rows": rows,
        "row_bytes": 3 * side * side,
        "weight_bytes": held,
        "budget_bytes": budget,
        "object_store_bytes": int(ray.cluster_resources().get("object_store_memory", 0)),
        "runs": runs,
    }


def _run(
    weights: Path, model: str, side: int, rows: int, budget: int, nodes: Sequence[str], inputs_per_sweep: int | None
) -> dict[str, Any]:
    import ray

    stats = MapStats()
    images = ray.data.range(rows, override_num_blocks=max(rows // 50, 1)).map_batches(partial(_images, side=side))
    mapped = map_dataset(
        images,
        zoo.get(model),
        weights,
        budget=budget,
        example=(torch.zeros(1, 3, side, side),),
        columns="image",
        prepare=_scaled,
        inputs_per_sweep=inputs_per_sweep,
        nodes=list(nodes),
        stats=stats,
    )
    began = time.perf_counter()
    first, first_rows, done = began, 0, 0
    for batch in mapped.iter_batches(batch_size=None):
        if not done:
            first, first_rows = time.perf_counter(), len(batch["id"])
        done += len(batch["id"])
    seconds = time.perf_counter() - first
    if done != rows:
        raise RuntimeError(f"{done} rows came out of {rows}")
    return {
        "nodes": len(nodes),
        "seconds": seconds,
        "inputs_per_second": (done - first_rows) / seconds if seconds > 0 else 0.0,
        "start_seconds": first - began,
        "by_node": [asdict(node) for node in stats.nodes()],
    }


def _weights(model: str, folder: Path) -> Path:
    plain, packed = folder / f"{model}.plain.safetensors", folder / f"{model}.safetensors"
    if not packed.exists():
        save_random_weights(model, plain, overwrite=True)
        pack(plain, packed)
        plain.unlink()
    return packed


def _images(batch: dict[str, Any], side: int) -> dict[str, Any]:
    """The same pixels for the same row, whenever and wherever they are made."""
    pixels = [np.random.default_rng(int(i)).integers(0, 256, (side, side, 3), np.uint8) for i in batch["id"]]
    return {"id": batch["id"], "image": np.stack(pixels)}


def _scaled(row: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(row["image"].copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
