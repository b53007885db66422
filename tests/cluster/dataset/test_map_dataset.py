"""A data set over a real cluster of three nodes: plain PyTorch's bits, each row once, whatever happens to a node."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import cluster_dataset_kit as kit
from cluster_kit import MEMORY, MIB, LocalCluster, local_cluster
from narrowboat.cluster.dataset import MapStats, RowError, map_dataset
from narrowboat.errors import MapError, PlacementError, UsageError


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster([("a", 100 * MIB), ("b", 200 * MIB), ("c", 100 * MIB)]) as made:
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        yield made


def rows_of(width: int, count: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


def items(x: torch.Tensor, blocks: int) -> Any:
    import ray

    return ray.data.from_items([{"id": i, "x": row.numpy()} for i, row in enumerate(x)], override_num_blocks=blocks)


def check_bits(model: nn.Module, x: torch.Tensor, rows: list[dict[str, Any]]) -> None:
    with torch.inference_mode():
        for row in rows:
            plain = model(x[row["id"]][None])[0]
            assert torch.equal(plain, torch.from_numpy(np.array(row["output"]))), row["id"]


def wait_until_free() -> None:
    """Workers have ended: their bytes are nobody's."""
    import ray

    deadline = time.monotonic() + 60
    while ray.available_resources().get(MEMORY, 0) < ray.cluster_resources()[MEMORY]:
        assert time.monotonic() < deadline, "a worker still has its node's bytes"
        gc.collect()  # tracebacks, which have Ray Data's actors in their frames
        time.sleep(0.1)


def test_parquet_to_parquet_in_order_with_the_bits_of_a_call(cluster: LocalCluster, tmp_path: Path) -> None:
    import ray

    model = kit.write(kit.deep, tmp_path / "w.safetensors")
    x = rows_of(kit.WIDTH, 203)  # no multiple of anything: short sweeps and short batches
    items(x, 7).write_parquet(str(tmp_path / "in"))
    stats = MapStats()
    mapped = map_dataset(
        ray.data.read_parquet(str(tmp_path / "in")),
        kit.deep,
        tmp_path / "w.safetensors",
        budget="16MiB",
        example=(torch.zeros(1, kit.WIDTH),),
        columns="x",
        inputs_per_sweep=4,
        ordered=True,
        stats=stats,
    )
    assert stats.nodes() == []  # lazy: nothing has run
    mapped.write_parquet(str(tmp_path / "out"))
    rows = ray.data.read_parquet(str(tmp_path / "out")).take_all()
    assert sorted(row["id"] for row in rows) == list(range(203))
    assert set(rows[0]) == {"id", "output"}
    check_bits(model, x, rows)
    nodes = stats.nodes()
    assert sum(node.inputs for node in nodes) == 203
    assert all(node.closed == node.workers == 1 for node in nodes)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert all(node.bytes_read > weights / 2 and node.peak_bytes > 0 and node.seconds > 0 for node in nodes)
    assert all(node.budget_bytes == 16 * MIB for node in nodes)
    assert "per sweep" in str(stats)
    wait_until_free()


def test_images_of_any_size_with_gaps_through_functions_of_the_user(cluster: LocalCluster, tmp_path: Path) -> None:
    import ray

    model = kit.write(kit.pixels, tmp_path / "w.safetensors")
    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (5 + i % 3, 6, 3), dtype=np.uint8) for i in range(12)]
    found = [{"id": i, "image": None if i % 5 == 4 else image, "note": None} for i, image in enumerate(images)]
    mapped = map_dataset(
        ray.data.from_items(found, override_num_blocks=2),
        kit.pixels,
        tmp_path / "w.safetensors",
        budget=None,
        example=(torch.zeros(1, 3, 6, 6),),
        columns="image",
        prepare=kit.as_image,
        finish=kit.label,
        missing="null",
        ordered=True,
    )
    rows = mapped.take_all()
    assert [row["id"] for row in rows] == list(range(12))
    for row in rows:
        if row["id"] % 5 == 4:
            assert row["label"] is None and row["scores"] is None
            continue
        with torch.inference_mode():
            plain = model(kit.as_image({"image": images[row["id"]]}))
        assert row["label"] == int(plain.argmax())
        assert torch.equal(plain[0], torch.from_numpy(np.array(row["scores"])))
    assert rows[0]["note"] is None


def test_a_row_that_the_model_refuses_is_named(cluster: LocalCluster, tmp_path: Path) -> None:
    import ray

    kit.write(kit.tally, tmp_path / "w.safetensors")
    rows = [{"name": f"n{i}", "words": [1, 2, 64 if i == 13 else 3], "scale": 1.0} for i in range(20)]
    mapped = map_dataset(
        ray.data.from_items(rows, override_num_blocks=1),
        kit.tally,
        tmp_path / "w.safetensors",
        budget="40MiB",
        example={"ids": torch.zeros(1, 3, dtype=torch.int64), "scale": torch.ones(1), "shift": 0.5},
        columns={"ids": "words", "scale": "scale"},
        output=["logits"],
        nodes=["b"],
    )
    with pytest.raises(MapError, match=r"row 13 of a batch of 20 \(name='n13'\).* on node b, with 'words', 'scale'"):
        mapped.take_all()
    wait_until_free()


def test_an_empty_data_set_stays_empty(cluster: LocalCluster, tmp_path: Path) -> None:
    import pyarrow as pa
    import ray

    kit.write(kit.pixels, tmp_path / "w.safetensors")
    empty = ray.data.from_arrow(pa.table({"id": pa.array([], pa.int64()), "x": pa.array([], pa.float32())}))
    mapped = map_dataset(
        empty,
        kit.pixels,
        tmp_path / "w.safetensors",
        budget="40MiB",
        example=(torch.zeros(1, 3, 6, 6),),
        columns="x",
        nodes=1,
    )
    assert mapped.take_all() == []


def test_a_budget_too_small_everywhere_is_refused_with_each_nodes_reason(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    import ray

    kit.write(kit.deep, tmp_path / "w.safetensors")

    def asked(weights: Path, **more: Any) -> None:
        map_dataset(ray.data.range(3), kit.deep, weights, example=(torch.zeros(1, kit.WIDTH),), columns="id", **more)

    with pytest.raises(PlacementError, match=r"it offers 100 MiB, and the budget is 1\.00 GiB") as refused:
        asked(tmp_path / "w.safetensors", budget="1GiB")
    assert set(refused.value.refusals["map"]) == {"a", "b", "c"}
    with pytest.raises(PlacementError, match=r"a: the model needs .* and would have 64\.0 KiB") as refused:
        asked(tmp_path / "w.safetensors", budget="64KiB")
    assert set(refused.value.refusals["map"]) == {"a", "b", "c"}
    with pytest.raises(PlacementError, match=r"a: WeightsNotFoundError: .*nowhere"):
        asked(tmp_path / "nowhere.safetensors", budget="20MiB", nodes=["a"])
    with pytest.raises(UsageError, match="no node 'z' in the cluster"):
        asked(tmp_path / "w.safetensors", budget="20MiB", nodes=["z"])


def test_a_data_set_larger_than_the_object_stores_passes_within_each_budget(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    import ray

    kit.write(kit.mean, tmp_path / "w.safetensors")
    stats = MapStats()
    rows = 1600  # of 256 KiB: 400 MiB, where the object stores of the nodes hold 80 MiB each
    mapped = map_dataset(
        ray.data.range(rows, override_num_blocks=50).map_batches(kit.large_rows),
        kit.mean,
        tmp_path / "w.safetensors",
        budget="24MiB",
        example=(torch.zeros(1, 1024, 64),),
        columns="x",
        stats=stats,
    )
    seen: list[int] = []
    for batch in mapped.iter_batches(batch_size=None):
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(rows))
    assert all(node.peak_bytes <= node.budget_bytes for node in stats.nodes()), str(stats)
    wait_until_free()


def test_a_node_dies_in_the_middle_and_every_row_comes_once(cluster: LocalCluster, tmp_path: Path) -> None:
    model = kit.write(kit.slow, tmp_path / "w.safetensors")
    x = rows_of(64, 600)
    stats = MapStats()
    mapped = map_dataset(
        items(x, 30),
        kit.slow,
        tmp_path / "w.safetensors",
        budget="60MiB",
        example=(torch.zeros(1, 64),),
        columns="x",
        stats=stats,
    )
    rows: list[dict[str, Any]] = []
    killed = ""
    for row in mapped.iter_rows():
        rows.append(row)
        at_work = [node.name for node in stats.nodes()] if not killed else []
        if at_work:
            killed = at_work[0]
            cluster.kill(killed)
    assert killed
    assert sorted(row["id"] for row in rows) == list(range(600))
    check_bits(model, x, rows)
    others = [node for node in stats.nodes() if node.name != killed]
    assert sum(node.inputs for node in others) > 0


def test_a_row_error_survives_pickling() -> None:
    import pickle

    told = pickle.loads(pickle.dumps(RowError("row 3", index=3)))
    assert isinstance(told, RowError) and str(told) == "row 3" and told.index == 3
