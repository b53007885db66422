"""One node for real, without a cluster: it learns, judges, runs, changes, puts down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narrowboat.cluster.node import NodeExecutor, parse_description
from narrowboat.cluster.settings import ROOT
from narrowboat.errors import ConflictError, NotServingError
from narrowboat.tasks.spec.load import load_tasks
from narrowboat.tasks.tensors import RawTensor
from task_nets_kit import nets  # noqa: F401

MIB = 1 << 20
TASKS = """
budget: 1MiB
margin: 6
calibration: 100ms
tasks:
  - {name: asked, model: "tasks_test_nets:other", weights: other.safetensors, input: {queue: q},
     contract: {burst: 2, period: 2s}, deadline: 2s}
  - {name: free, model: "tasks_test_nets:deep", weights: deep.safetensors, input: {queue: q},
     contract: {burst: 50, period: 20ms}, deadline: 1s, guarantee: best-effort}
  - {name: absent, model: "tasks_test_nets:wide", weights: absent.safetensors, period: 1s}
  - {name: soon, model: "tasks_test_nets:deep", weights: deep.safetensors, input: {queue: q}, period: 3ms}
"""


def with_node(
    folder: Path,
    work: Callable[[NodeExecutor, dict[str, Any]], Coroutine[Any, Any, None]],
    budget: int = 80 * MIB,
    lease: float | None = None,
) -> None:
    path = folder / "cluster.yaml"
    path.write_text(TASKS)
    described = parse_description(load_tasks(path))

    async def go() -> None:
        node = NodeExecutor("n", budget, lease)
        try:
            async with asyncio.timeout(200):
                told = await node.learn(described, str(folder), 4000)
                await work(node, told)
        finally:
            await node.close()

    asyncio.run(go())


def x(width: int) -> dict[str, RawTensor]:
    return {"x": RawTensor("FP32", (1, width), np.ones((1, width), np.float32).tobytes())}


def test_a_node_learns_judges_runs_changes_and_puts_down(nets: Path) -> None:  # noqa: F811
    import tasks_test_nets  # type: ignore[import-not-found]

    async def work(node: NodeExecutor, told: dict[str, Any]) -> None:
        assert "absent.safetensors" in told["absent"]["reason"]
        assert "over before a node is reached" in told["soon"]["reason"]
        assert told["asked"]["nbytes"] > 0 and 0 < told["asked"]["utilisation"] < 1 and told["asked"]["weights"]
        assert (await node.fits(["asked", "free"]))["fits"]
        tiny = NodeExecutor("tiny", 64 << 10)
        found = await tiny.learn(parse_description(load_tasks(nets / "cluster.yaml")), str(nets), 4000)
        assert "64.0 KiB" in found["asked"]["reason"] and "64.0 KiB" in (await tiny.fits(["asked"]))["reason"]
        assert "absent cannot run here" in (await node.fits(["asked", "absent"]))["reason"]
        assert (await node.beat())["state"] == "idle"
        with pytest.raises(NotServingError):
            await node.infer("asked", x(128))

        await node.put(["asked"])
        torch.manual_seed(len("other"))
        network = tasks_test_nets.other()
        with torch.inference_mode():
            expected = network(torch.ones(1, 128))
        reply = await node.infer("asked", x(128))
        assert bytes(reply.outputs[0][1].data) == expected.numpy().tobytes(), "the same bits"
        assert reply.admitted and reply.deadline == 2_000_000 - 4000

        await node.put(["asked", "free"])
        assert (await node.infer("free", x(256))).outputs and (await node.infer("asked", x(128))).outputs
        assert {face["name"] for face in await node.faces()} == {"asked", "free"}
        assert (await node.beat())["running"] == ["asked", "free"]

        await node.put(["free"])
        with pytest.raises(NotServingError):
            await node.infer("asked", x(128))
        with pytest.raises(ConflictError, match="absent cannot run"):
            await node.put(["absent"])
        assert (await node.infer("free", x(256))).outputs, "a refusal changes nothing"
        await node.put([])
        assert (await node.beat()) | {"born": ""} == {
            "born": "",
            "running": [],
            "state": "idle",
            "said": "",
            "tick": {},
        }

    with_node(nets, work)


def test_a_node_that_hears_nothing_for_its_lease_puts_its_tasks_down(nets: Path) -> None:  # noqa: F811
    async def work(node: NodeExecutor, told: dict[str, Any]) -> None:
        await node.put(["free"])
        assert node._running == ("free",)
        async with asyncio.timeout(30):
            while node._running:
                await asyncio.sleep(0.05)  # nobody asks
        with pytest.raises(NotServingError):
            await node.infer("free", x(256))
        await node.put(["free"])
        assert (await node.infer("free", x(256))).outputs, "and takes them again"

    with_node(nets, work, lease=2.0)


def test_relative_paths_are_meant_from_the_node_s_own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(TASKS.replace("other.s", "absent.s").replace("deep.s", "absent.s"))
    described = parse_description(load_tasks(path))

    def why(folder: str) -> str:
        return str(asyncio.run(NodeExecutor("n", 80 * MIB).learn(described, folder, 4000))["free"]["reason"])

    assert why("/ingress") == "weights file not found on node n: /ingress/absent.safetensors"
    monkeypatch.setenv(ROOT, "/node")
    assert why("/ingress") == "weights file not found on node n: /node/absent.safetensors"
