"""Pipelines on a real Ray cluster of three nodes: bits, overlap, refusals, and nodes that die or fall silent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pipeline_kit as kit
from cluster_kit import MEMORY, MIB, LocalCluster, local_cluster
from narrowboat.cluster.pipeline import Pipeline
from narrowboat.errors import (
    NodeLostError,
    PlacementError,
    SessionClosedError,
    UsageError,
    WeightsNotFoundError,
)

BUDGET = 64 * MIB
Decoder = tuple[Path, list[tuple[torch.Tensor, ...]], list[torch.Tensor]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster([("a", BUDGET), ("b", BUDGET), ("c", BUDGET)]) as made:
        yield made


@pytest.fixture(scope="module")
def decoder(
    tmp_path_factory: pytest.TempPathFactory,
) -> Decoder:
    """Weights, inputs, and what plain PyTorch answers."""
    module, path = kit.made(kit.llama, tmp_path_factory.mktemp("decoder"))
    inputs = [(torch.randint(0, 512, (2, 16)),) for _ in range(10)]
    with torch.inference_mode():
        return path, inputs, [module(*x, use_cache=False).logits for x in inputs]


def wait_until_given_back(cluster: LocalCluster) -> None:
    """All memory is Ray's again: no actor of a pipeline is left."""
    import ray

    end = time.monotonic() + 30
    while ray.available_resources().get(MEMORY, 0) < BUDGET * len(cluster.nodes):
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.1)


def test_weights_that_are_missing_on_a_node_are_named_before_anything_runs(
    cluster: LocalCluster, decoder: Decoder, tmp_path: Path
) -> None:
    path, inputs, _ = decoder
    gone = tmp_path / "gone.safetensors"
    with pytest.raises(WeightsNotFoundError, match=r"node b: .*gone\.safetensors"):
        Pipeline(kit.llama_uncached, {"a": path, "b": gone}, example=inputs[0], nodes=["a", "b"])
    with pytest.raises(UsageError, match="there is no node 'elsewhere'"):
        Pipeline(kit.llama_uncached, path, example=inputs[0], nodes=["elsewhere"])
    with pytest.raises(UsageError, match=r"offers 64\.0 MiB .* and is to give 1\.00 GiB"):
        Pipeline(kit.llama_uncached, path, example=inputs[0], budget="1GiB")
    with pytest.raises(PlacementError, match=r"node a gives 1\.00 MiB, and .* alone takes .* if the node gave"):
        Pipeline(kit.llama_uncached, path, example=inputs[0], nodes=["a"], budget="1MiB")
    wait_until_given_back(cluster)


def test_three_stages_give_the_same_bits_and_a_silent_node_is_named(cluster: LocalCluster, decoder: Decoder) -> None:
    path, inputs, wants = decoder
    with Pipeline(kit.llama_uncached, path, example=inputs[0], budget="24MiB", stages=3, timeout=60) as pipeline:
        assert len(set(pipeline.nodes)) == 3
        for x, want in zip(inputs[:3], wants, strict=False):
            assert torch.equal(pipeline(*x).logits, want)
        got = [answer.logits for answer in pipeline.map(inputs)]
        assert len(got) == len(wants)
        assert all(torch.equal(one, other) for one, other in zip(got, wants, strict=True))

        stats = pipeline.stats()
        total = path.stat().st_size
        shares = [stage["weight_bytes"] for stage in stats["stages"]]
        assert sum(shares) <= total + MIB
        for stage in stats["stages"]:
            assert stage["passes"] == 13
            # Each pass its own part at most, and the sample by which the storage is measured once.
            assert stage["bytes_read_in_all"] <= 14 * stage["weight_bytes"] + 16 * MIB + MIB
            assert max(stage["bytes_read"]) <= stage["weight_bytes"] < 0.7 * total
        assert all(hop["latency_ms"] > 0 and hop["bytes"] > 0 for hop in stats["hops"])
        assert stats["measured_latency_ms"] > 0
        assert stats["predicted_latency_ms"] > stats["predicted_period_ms"] > 0

        with pytest.raises(UsageError, match=r"recorded for \[2, 16\]"):
            pipeline(torch.zeros(2, 8, dtype=torch.long))
        abandoned = pipeline.map(inputs)
        assert torch.equal(next(abandoned).logits, wants[0])
        abandoned.close()
        assert torch.equal(pipeline(*inputs[1]).logits, wants[1])

        pipeline.timeout = 2.0
        silent = pipeline.nodes[1]
        cluster.nodes[silent].freeze()
        try:
            begin = time.monotonic()
            with pytest.raises(NodeLostError, match=f"node {silent} has not been heard of"):
                pipeline(*inputs[0])
            assert time.monotonic() - begin < 25
        finally:
            cluster.nodes[silent].thaw()
        with pytest.raises(NodeLostError, match="make another one"):
            pipeline(*inputs[0])
    with pytest.raises(SessionClosedError):
        pipeline(*inputs[0])
    wait_until_given_back(cluster)


def test_a_node_killed_in_the_middle_is_replaced_and_no_input_is_lost(cluster: LocalCluster, tmp_path: Path) -> None:
    module, path = kit.made(kit.resnet, tmp_path)
    inputs = [(torch.randn(2, 3, 64, 64),) for _ in range(8)]
    with torch.inference_mode():
        wants = [module(*x) for x in inputs]
    with Pipeline(kit.resnet, path, example=inputs[0], stages=2, on_loss="replace") as pipeline:
        got = []
        for number, answer in enumerate(pipeline.map(inputs)):
            got.append(answer)
            if number == 2:
                cluster.kill(pipeline.nodes[1])
        assert all(torch.equal(one, other) for one, other in zip(got, wants, strict=True))
        assert pipeline.stats()["replaced"] == 1
        # Two nodes are left, and both are in use: one more, and there is none to replace it.
        cluster.kill(pipeline.nodes[0])
        with pytest.raises(NodeLostError, match=r"died.*cannot be replaced"):
            pipeline(*inputs[0])
    wait_until_given_back(cluster)
